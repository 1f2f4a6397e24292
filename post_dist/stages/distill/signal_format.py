"""What a cache of the teacher's signals keeps of each token: one rule for run and plan."""

from collections.abc import Sequence

from post_dist.config.schema import Distill, Student
from post_dist.losses.terms import hidden_terms_in_use
from post_dist.models.facts import ModelFacts

SAMPLES = 28
"""Draws of a position: four bytes each, and four for the entropy, make 116 bytes."""


def exact_product(teacher: ModelFacts, *, fp32: bool) -> bool:
    """Decide whether a product with the head can stand for the teacher's whole distribution.

    The logits must be one matrix product in fp32. A soft cap or a bias would be missing in the
    product. In bf16 the student's own product and the teacher's would each be rounded before their
    difference is taken. That difference is the whole gradient of a good student, so hidden states
    are kept there.
    """
    return teacher.linear_head and fp32


def kept_names(section: Distill, student: Student, *, exact_product: bool) -> list[str]:
    """List what is kept of each token, by the names of the signal's tensors.

    Args:
        section: kind of the cache, which is not `none`, and the weights of the loss terms.
        student: whether its head is frozen, and which layers it shares with the teacher.
        exact_product: whether a product with the head can stand for the distribution.
    """
    if section.cache == "sampled":
        names = {"samples", "entropy"}
    elif exact_product and student.freeze_head:
        names = {"product", "entropy"}
        # Terms such as the cosine compare hidden states, whatever stands for the distribution.
        if hidden_terms_in_use(section):
            names.add("hidden")
    else:
        names = {"hidden"}
    if section.layers_in_teacher(student):
        names.add("below")
    return sorted(names)


def kept_bytes(names: Sequence[str], width: int, bytes_each: int) -> int:
    """Compute the bytes that are kept of one token.

    Args:
        names: as `kept_names` lists them.
        width: width d of the teacher's hidden states.
        bytes_each: bytes of one element of a hidden state.
    """
    fixed = {"samples": 4 * SAMPLES, "entropy": 4}
    return sum(fixed.get(name, width * bytes_each) for name in names)
