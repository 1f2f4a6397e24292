"""The distillation loss (paper eq. 1): a weighted sum of the terms in `post_dist.losses.terms`.

Shapes: N positions, B positions of one chunk, d width, V vocabulary, K terms on logits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from post_dist.losses.heads import Heads
from post_dist.losses.pieces import split_positions
from post_dist.losses.signals import HiddenSignal, TeacherSignal, hidden_states
from post_dist.losses.terms import HIDDEN_TERMS, LOGIT_TERMS, TERMS
from post_dist.losses.terms.base import LogitChunk

_LOGITS_IN_CACHE = 1 << 20
"""Logits that a CPU processes at once: 4 MiB in fp32, so that a few copies stay in its cache."""


@dataclass(frozen=True)
class LossSettings:
    """Settings of the distillation loss.

    Attributes:
        weights: weight of each term by its metric name (see `terms.weights_of`).
        temperature: T, which softens both distributions of the KL divergence.
        pieces: number of pieces into which the positions are split. The logits of only one piece
            are in memory (see `logit_pieces`). All ranks of a sharded head must use the same
            number, even if their numbers of positions differ.
        compiled: whether torch compiles the terms, which fuses their passes over the logits.
    """

    weights: Mapping[str, float]
    temperature: float
    pieces: int = 1
    compiled: bool = False


@dataclass(frozen=True)
class TermValues:
    """Values of the loss terms for a batch: means over its positions, without gradients.

    Attributes:
        by_metric: scalar of each term by its metric name; 0 if the teacher signal lacks its input.
    """

    by_metric: Mapping[str, torch.Tensor]

    def __getitem__(self, metric: str) -> torch.Tensor:
        """Return the value of one term."""
        return self.by_metric[metric]

    def stacked(self) -> torch.Tensor:
        """Return the values of all terms in the order of `TERMS`."""
        return torch.stack([self.by_metric[term.metric] for term in TERMS])


def distillation_loss(
    student_Nd: torch.Tensor,
    teacher: TeacherSignal,
    labels_N: torch.Tensor,
    heads: Heads,
    settings: LossSettings,
) -> tuple[torch.Tensor, TermValues]:
    """Compute the loss while the logits of only a few positions are in memory at a time.

    The gradient with respect to the logits has a closed form. It is propagated through the head
    while the logits exist. So the logits are neither stored nor computed twice, and the backward
    pass only scales the result.

    Args:
        student_Nd: the student's last hidden states.
        teacher: the teacher's signal at the same positions.
        labels_N: the label of each position; -100 where there is none.
        heads: the heads of both models.
        settings: weights of the terms, temperature and number of pieces.

    Returns:
        The loss, and the value of each term.
    """
    positions = len(student_Nd)
    counts = {term.metric: term.positions(labels_N) for term in LOGIT_TERMS}
    # Values and gradients from the logits are sums over positions, and divided by N at the end. In
    # fp16 the gradient of the mean would underflow before the loss scale is applied.
    scales = {}
    for metric, count in counts.items():
        weight = settings.weights[metric]
        scales[metric] = weight if count == positions else weight * positions / count

    # All terms on logits share one pass over the pieces, and one gradient.
    batch = _LogitBatch(student_Nd, teacher, labels_N, heads, settings, scales)
    sums_K, gradients = batch.sums_and_gradients()
    summed = sum(
        (scales[term.metric] * sums_K[index] for index, term in enumerate(LOGIT_TERMS)),
        start=torch.zeros((), device=student_Nd.device),
    )
    # These are the gradients of `summed`. Autograd handles the division by N below.
    if gradients:
        summed = _WithGradients.apply(summed, gradients, student_Nd, *heads.trained)
    loss = summed / positions
    values = {
        term.metric: sums_K[index] / counts[term.metric] for index, term in enumerate(LOGIT_TERMS)
    }

    # These terms need no logits, so autograd differentiates them.
    teacher_Nd = hidden_states(teacher)
    for hidden_term in HIDDEN_TERMS:
        # A signal without hidden states gives 0; `conflicts.py` refuses a weight above 0.
        value = torch.zeros((), device=student_Nd.device)
        if teacher_Nd is not None:
            value = hidden_term.value(student_Nd, teacher_Nd)
        loss = loss + settings.weights[hidden_term.metric] * value
        values[hidden_term.metric] = value.detach()
    return loss, TermValues(values)


class _LogitBatch:
    """Computes the logit terms of a batch, piece by piece."""

    def __init__(
        self,
        student_Nd: torch.Tensor,
        teacher: TeacherSignal,
        labels_N: torch.Tensor,
        heads: Heads,
        settings: LossSettings,
        scales: Mapping[str, float],
    ) -> None:
        self._student_Nd = student_Nd
        self._teacher = teacher
        self._labels_N = labels_N
        self._heads = heads
        self._settings = settings
        self._scales = scales

    def sums_and_gradients(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the sum of each term [K], and the gradients of the scaled total.

        The gradients are with respect to the student's hidden states and the trained parameters of
        its head. The list is empty if no gradient is required.
        """
        student_Nd = self._student_Nd
        differentiate = torch.is_grad_enabled() and student_Nd.requires_grad
        # Evaluation and frozen inputs need no gradients, so none are computed.
        gradients = []
        if differentiate:
            inputs = (student_Nd, *self._heads.trained)
            gradients = [torch.zeros_like(tensor) for tensor in inputs]
        sums_K = torch.zeros(len(LOGIT_TERMS), device=student_Nd.device)

        for part in split_positions(len(student_Nd), self._settings.pieces):
            # A leaf for each piece: the head's graph ends here, and is freed with the piece.
            hidden_Bd = student_Nd[part].detach().requires_grad_(differentiate)
            logits_BV = self._heads.student(hidden_Bd)
            with torch.no_grad():
                own_K, of_logits_BV = self._logit_terms(logits_BV.detach(), hidden_Bd, part)
            # Sums stay on the device: reading them would synchronize with it in every piece.
            sums_K = sums_K + own_K
            if differentiate:
                # Differentiate now, because the logits are freed with this piece.
                leaves = [hidden_Bd, *self._heads.trained]
                own = torch.autograd.grad(logits_BV, leaves, of_logits_BV)
                gradients[0][part] = own[0]
                # The head's parameters see every position, so their gradients are summed.
                for total, gradient in zip(gradients[1:], own[1:], strict=True):
                    total += gradient

        if differentiate:
            self._add_gradients_without_logits(gradients[0])
        return sums_K, gradients

    def _add_gradients_without_logits(self, gradient_Nd: torch.Tensor) -> None:
        """Add the parts of the gradient that need no logits, in place."""
        for term in LOGIT_TERMS:
            own_Nd = term.gradient_of_hidden(
                self._teacher, self._scales[term.metric], self._settings.temperature
            )
            if own_Nd is not None:
                gradient_Nd += own_Nd

    def _logit_terms(
        self, logits_BV: torch.Tensor, hidden_Bd: torch.Tensor, part: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each term's sum [K] over a piece, and the gradient [B, V] of the scaled total.

        The heads run on the whole piece, because large matrix products are fastest. A CPU then
        processes the logits a few positions at a time, so that they stay in its cache.
        """
        chunk = LogitChunk(
            student_BV=logits_BV,
            student_Bd=hidden_Bd,
            teacher=self._teacher[part],
            teacher_BV=self._teacher_logits(part),
            labels_B=self._labels_N[part],
            temperature=self._settings.temperature,
        )
        # On a GPU, one kernel for the whole piece is fastest.
        chunks = 1
        if logits_BV.device.type == "cpu":
            chunks = max(1, -(-logits_BV.numel() // _LOGITS_IN_CACHE))
        terms_of = _compiled_terms() if self._settings.compiled else _terms_of_chunk
        sums_K = torch.zeros(len(LOGIT_TERMS), device=logits_BV.device)
        # In the dtype of the logits, as the head's backward pass requires.
        gradient_BV = torch.empty_like(logits_BV)
        for positions in split_positions(len(logits_BV), chunks):
            # Assign directly: a variable for the fp32 gradient would keep it in memory.
            own_K, gradient_BV[positions] = terms_of(_in_fp32(chunk, positions), self._scales)
            sums_K = sums_K + own_K
        return sums_K, gradient_BV

    def _teacher_logits(self, part: slice) -> torch.Tensor | None:
        """Run the teacher's head if the signal holds only hidden states."""
        if isinstance(self._teacher, HiddenSignal):
            return self._heads.teacher(self._teacher.hidden[part])
        return None


def _in_fp32(piece: LogitChunk, positions: slice) -> LogitChunk:
    """Return some positions of a piece, with the student's logits in fp32."""
    teacher_BV = piece.teacher_BV
    return LogitChunk(
        student_BV=piece.student_BV[positions].float(),
        student_Bd=piece.student_Bd[positions],
        teacher=piece.teacher[positions],
        teacher_BV=None if teacher_BV is None else teacher_BV[positions],
        labels_B=piece.labels_B[positions],
        temperature=piece.temperature,
    )


def _terms_of_chunk(
    chunk: LogitChunk, scales: Mapping[str, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each term's sum [K] over a chunk, and the gradient, in fp32."""
    # Each term adds to the gradient of the terms before it. A second fp32 tensor [B, V] would
    # double the memory.
    sums = []
    gradient_BV: torch.Tensor | None = None
    for term in LOGIT_TERMS:
        own, gradient_BV = term.sum_and_gradient(chunk, scales[term.metric], gradient_BV)
        sums.append(own)
    if gradient_BV is None:
        gradient_BV = torch.zeros_like(chunk.student_BV)
    return torch.stack(sums), gradient_BV


@cache
def _compiled_terms() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return the compiled `_terms_of_chunk`, which takes chunks of any length."""
    return torch.compile(_terms_of_chunk, dynamic=True)


class _WithGradients(torch.autograd.Function):
    """Gives a value the gradients that were computed together with it."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, gradients: list[torch.Tensor], *inputs: torch.Tensor
    ) -> torch.Tensor:
        # `save_for_backward` is not for these tensors: they are neither inputs nor outputs.
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Multiply in fp32, because a loss scale may exceed the range of fp16.
        scaled = []
        for gradient in ctx.gradients:
            scaled.append((upstream[0] * gradient.float()).to(gradient.dtype))
        return None, None, *scaled
