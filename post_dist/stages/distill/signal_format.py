"""The contents of a cache of teacher signals. Both `distill` and `plan` follow these rules."""

from collections.abc import Sequence

from post_dist.config.schema import Distill, Student
from post_dist.losses.terms import hidden_terms_in_use
from post_dist.models.facts import ModelFacts
from post_dist.stages.distill.signal_files import SEQUENCES_A_FILE

SAMPLES = 28
"""Samples at each position. At four bytes each, with four for the entropy, they take 116 bytes."""

GIB = 2**30
_HEADER_BYTES = 8192
"""Upper bound for the header of a file: names, shapes, and a digest of each sequence."""


def exact_product(teacher: ModelFacts, *, fp32: bool) -> bool:
    """Return whether a stored product with the head can replace the teacher's whole distribution.

    The logits must be one matrix product in fp32. The product would lack a soft cap or a bias. In
    bf16, the products of student and teacher would be rounded before they are subtracted. For a
    good student, that difference is the whole gradient. The cache then stores hidden states.
    """
    return teacher.linear_head and fp32


def kept_names(section: Distill, student: Student, *, exact_product: bool) -> list[str]:
    """List the names of the signal's tensors that a cache stores.

    Args:
        section: kind of the cache, which is not `none`, and the weights of the loss terms.
        student: whether its head is frozen, and which layers it shares with the teacher.
        exact_product: whether a stored product can replace the distribution.
    """
    if section.cache == "sampled":
        names = {"samples", "entropy"}
    elif exact_product and student.freeze_head:
        names = {"product", "entropy"}
        # Terms such as the cosine compare hidden states, so they need these as well.
        if hidden_terms_in_use(section):
            names.add("hidden")
    else:
        names = {"hidden"}
    if section.layers_in_teacher(student):
        names.add("below")
    return sorted(names)


def kept_bytes(names: Sequence[str], width: int, bytes_each: int) -> int:
    """Compute the number of bytes that a cache stores for one token.

    Args:
        names: names of the tensors, from `kept_names`.
        width: width d of the teacher's hidden states.
        bytes_each: bytes of one element of a hidden state.
    """
    fixed = {"samples": 4 * SAMPLES, "entropy": 4}
    return sum(fixed.get(name, width * bytes_each) for name in names)


def file_bytes(bytes_per_token: int, length: int) -> int:
    """Compute an upper bound for the bytes of one file.

    Args:
        bytes_per_token: bytes that are stored for one token, from `kept_bytes`.
        length: tokens in a sequence.
    """
    return SEQUENCES_A_FILE * length * bytes_per_token + _HEADER_BYTES


def files_within(gib: float, bytes_per_token: int, length: int) -> int:
    """Compute how many files fit into a number of GiB.

    Args:
        gib: the limit, `distill.cache_gib`.
        bytes_per_token: bytes that are stored for one token, from `kept_bytes`.
        length: tokens in a sequence.
    """
    return int(gib * GIB // file_bytes(bytes_per_token, length))
