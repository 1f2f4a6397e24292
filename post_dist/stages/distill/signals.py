"""Where a training step gets the teacher's signal from, and what a cache keeps of it.

`OnlineTeacher` runs the teacher in every step. `CachedTeacher` reads files that were written once.

Shapes: B sequences, T tokens.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from post_dist.config.schema import Distill, Student
from post_dist.losses.signals import TeacherSignal
from post_dist.losses.terms import hidden_terms_in_use

SAMPLES = 28
"""Tokens drawn at a position: at four bytes each, and four for the entropy, 116 bytes."""


class SignalSource(Protocol):
    """Gives the teacher's signal for sequences of the corpus."""

    def signals_of(
        self,
        numbers: Sequence[int],
        input_ids_BT: torch.Tensor,
        positions_BT: torch.Tensor | None,
    ) -> TeacherSignal:
        """Return the signal, each tensor [B, T, ...]. All ranks call it equally often.

        Args:
            numbers: the numbers of the B sequences in the corpus.
            input_ids_BT: their tokens, as the student reads them.
            positions_BT: positions of the tokens where documents are kept apart, else None.
        """


def kept_names(section: Distill, student: Student, *, exact_product: bool) -> list[str]:
    """Return which tensors of a signal are cached for each token, by the signal's field names.

    Args:
        section: the section `distill` of the run file; its `cache` is not `none`.
        student: the section `student`.
        exact_product: whether a product with the head can stand for the distribution (see
            `signal_maker`).
    """
    # Samples and products stand for the distribution; hidden states serve in all other cases.
    if section.cache == "sampled":
        names = {"samples", "entropy"}
    elif student.freeze_head and exact_product:
        names = {"product", "entropy"}
        if hidden_terms_in_use(section):
            names.add("hidden")
    else:
        names = {"hidden"}
    # The student starts from the lower block's output, so it is needed in any kind of cache.
    if section.layers_in_teacher(student):
        names.add("below")
    return sorted(names)


def kept_bytes(names: Sequence[str], width: int, bytes_each: int) -> int:
    """Return the bytes that a cache takes for one token.

    Args:
        names: what is kept, from `kept_names`.
        width: width of the teacher's hidden states.
        bytes_each: bytes of one number in a hidden state.
    """
    # All other tensors are as wide as a hidden state.
    special = {"samples": 4 * SAMPLES, "entropy": 4}
    return sum(special.get(name, width * bytes_each) for name in names)
