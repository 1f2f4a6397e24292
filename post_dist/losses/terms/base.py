"""Interfaces of the terms of the distillation loss.

Shapes: B positions of one chunk, N positions of the batch, d width, V vocabulary.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from post_dist.losses.signals import TeacherSignal


@dataclass(frozen=True)
class LogitChunk:
    """Logits of a few positions, and the targets of the terms there, without gradients.

    Attributes:
        student_BV: the student's logits in fp32.
        student_Bd: the student's hidden states, from which its head computed the logits.
        teacher: the teacher's signal at the same positions.
        teacher_BV: the teacher's logits; None if the signal itself represents its distribution.
        labels_B: the label of each position; -100 where there is none.
        temperature: T, which softens both distributions.
    """

    student_BV: torch.Tensor
    student_Bd: torch.Tensor
    teacher: TeacherSignal
    teacher_BV: torch.Tensor | None
    labels_B: torch.Tensor
    temperature: float


class Term:
    """One term of the distillation loss.

    To add a term, write its class in a file of this package, and list it in `TERMS`. Then add its
    weight to the section `distill` in config/stages.py.

    Attributes:
        metric: name of the term in `metrics.jsonl` and in the student's manifest.
        weight_field: field of the section `distill` that holds the weight.
    """

    metric: ClassVar[str]
    weight_field: ClassVar[str]


class LogitTerm(Term, ABC):
    """Term that is the mean over positions of a function of the student's logits.

    Its gradient is computed together with its value, because the logits of a chunk are freed before
    the backward pass.
    """

    @abstractmethod
    def positions(self, labels_N: torch.Tensor) -> int:
        """Return the number of positions in the mean, at least 1."""

    @abstractmethod
    def sum_and_gradient(
        self, chunk: LogitChunk, scale: float, gradient_BV: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the term's sum over a chunk, and add its gradient to that of earlier terms.

        Args:
            chunk: the logits.
            scale: factor of the gradient; the returned sum is not scaled.
            gradient_BV: gradient of earlier terms in fp32; None for the first term. It may be
                changed in place, so that no second tensor of this size is needed.

        Returns:
            The sum, and the gradient [B, V] of all terms so far.
        """

    def gradient_of_hidden(
        self, teacher: TeacherSignal, scale: float, temperature: float
    ) -> torch.Tensor | None:
        """Return the part of the scaled gradient [N, d] that needs no logits, or None.

        Args:
            teacher: the signal at all N positions.
            scale: factor of the gradient.
            temperature: T of the softened distributions.
        """
        return None


class HiddenTerm(Term, ABC):
    """Term that compares the last hidden states of the student and the teacher."""

    @abstractmethod
    def value(self, student_Nd: torch.Tensor, teacher_Nd: torch.Tensor) -> torch.Tensor:
        """Return the mean of the term over positions, differentiable by autograd."""
