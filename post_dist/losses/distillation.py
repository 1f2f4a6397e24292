"""The losses of distillation and transfer: pure functions of tensors.

Shapes: B rows, K scores (the vocabulary, or a task's classes), N positions, d width, V vocabulary, S samples.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

Head = Callable[[torch.Tensor], torch.Tensor]

LOGITS_AT_ONCE = 1 << 24
"""Logits of one model that are alive together, 64 MB in fp32: 341 positions at a vocabulary of 49,152."""
_LOGITS_IN_CACHE = 1 << 20
"""Logits that a CPU goes over at once: 4 MB in fp32, of which a few copies are alive."""


@dataclass(frozen=True)
class DistillationTerms:
    """The three terms of a batch, each a mean over its positions, without gradient.

    Attributes:
        ce: T^2 KL of the teacher to the student.
        lm: cross-entropy of the labels.
        cos: one minus the cosine of the last hidden states; 0 where the teacher's are not known.
    """

    ce: torch.Tensor
    lm: torch.Tensor
    cos: torch.Tensor


@dataclass(frozen=True)
class TeacherSignal:
    """What is known of a teacher at N positions: its hidden states, or its product, or samples of it.

    Attributes:
        hidden: last hidden states [N, d]; the cosine term needs them.
        product: softmax(teacher/T) W [N, d], with W the head that teacher and student share. It stands for the whole distribution: the
            mean logit of a student is product times hidden state, so loss and gradient are exact without the teacher's head.
        samples: tokens [N, S] of equal weight, drawn from softmax(teacher/T); loss and gradient are right on average.
        entropy: of softmax(teacher/T), [N], with product or samples.
        below: what the teacher's lowest layers made [N, d], where the student has the same and does not run them again.
    """

    hidden: torch.Tensor | None = None
    product: torch.Tensor | None = None
    samples: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    below: torch.Tensor | None = None

    def __getitem__(self, part: slice) -> "TeacherSignal":
        """At some of the positions."""
        return self.map(lambda tensor: tensor[part])

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "TeacherSignal":
        """With every tensor changed."""
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        return TeacherSignal(
            **{name: None if tensor is None else change(tensor) for name, tensor in kept.items()}
        )


def distillation_loss(
    student_Nd: torch.Tensor,
    teacher: TeacherSignal,
    labels_N: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    *,
    weights: tuple[float, float, float],
    temperature: float,
    pieces: int = 1,
    head_parameters: tuple[nn.Parameter, ...] = (),
) -> tuple[torch.Tensor, DistillationTerms]:
    """a_ce T^2 KL + a_lm LM + a_cos COS (paper eq. 1), with the logits [N, V] of a few positions alive at a time.

    The gradient with respect to the logits has a closed form, so it is taken back through the head while the logits are
    there; the backward only scales it. No logits are kept or made twice. It is the gradient of N times the loss, for in fp16 that of
    the mean would vanish here, before the scale of the loss could reach it.

    Args:
        student_Nd: last hidden states of the student.
        teacher: at the same positions, without gradient.
        labels_N: the token that each position should give; -100 where none is asked for.
        student_head: from hidden states to logits.
        teacher_head: the same of the teacher; run where hidden states are all that is known.
        weights: a_ce, a_lm, a_cos.
        temperature: T.
        pieces: into how many the positions are cut, whose logits are alive one after another (see `logit_pieces`). All ranks of a
            sharded head must give the same, however many positions each has.
        head_parameters: those of the student's head that are trained.

    Returns:
        The loss, and its terms.
    """
    a_ce, a_lm, a_cos = weights
    labelled = int((labels_N != -100).sum().clamp(min=1))
    scales = _Scales(a_ce, a_lm * len(student_Nd) / labelled, temperature)
    differentiate = torch.is_grad_enabled() and student_Nd.requires_grad
    gradients = (
        [torch.zeros_like(tensor) for tensor in (student_Nd, *head_parameters)]
        if differentiate
        else []
    )
    ce = lm = torch.zeros((), device=student_Nd.device)
    for part in _parts(len(student_Nd), pieces):
        hidden = student_Nd[part].detach().requires_grad_(differentiate)
        logits = student_head(hidden)
        with torch.no_grad():
            own_ce, own_lm, of_logits = _logit_terms(
                logits.detach(), hidden, teacher[part], teacher_head, labels_N[part], scales
            )
        ce, lm = ce + own_ce, lm + own_lm
        if differentiate:
            own = torch.autograd.grad(logits, [hidden, *head_parameters], of_logits)
            gradients[0][part] = own[0]
            for total, gradient in zip(gradients[1:], own[1:], strict=True):
                total += gradient
    if differentiate and teacher.product is not None:
        gradients[0] -= scales.ce * temperature * teacher.product
    summed = scales.ce * ce + scales.lm * lm
    if differentiate:
        summed = _WithGradients.apply(summed, gradients, student_Nd, *head_parameters)
    if teacher.hidden is not None:
        cos = (
            1
            - functional.cosine_similarity(
                student_Nd.float(), teacher.hidden.float(), dim=-1
            ).mean()
        )
    else:
        cos = torch.zeros_like(ce)
    return summed / len(student_Nd) + a_cos * cos, DistillationTerms(
        ce / len(student_Nd), lm / labelled, cos.detach()
    )


def logit_pieces(positions: int, vocabulary: int) -> int:
    """Into how many pieces so many positions are cut, so that few logits are alive at once."""
    return -(-positions * vocabulary // LOGITS_AT_ONCE)


def _parts(positions: int, pieces: int) -> list[slice]:
    """Slices of about equal length; empty ones where there are more pieces than positions."""
    cuts = [positions * piece // pieces for piece in range(pieces + 1)]
    return [slice(first, end) for first, end in pairwise(cuts)]


@dataclass(frozen=True)
class _Scales:
    """What the terms of one position are multiplied by, and T."""

    ce: float
    lm: float
    temperature: float


def _logit_terms(
    logits_BV: torch.Tensor,
    student_Bd: torch.Tensor,
    teacher: TeacherSignal,
    teacher_head: Head,
    labels_B: torch.Tensor,
    scales: _Scales,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of the two terms over the rows, and the gradient [B, V] of their weighted sum with respect to the student's logits.

    The product's part of the gradient is left out: it has no need of logits. The heads run for all rows at once, as matrix products
    want it; a CPU then goes over the logits a few rows at a time, which stay in its cache from one pass to the next.
    """
    teacher_BV = (
        teacher_head(teacher.hidden)
        if teacher.hidden is not None and teacher.entropy is None
        else None
    )
    pieces = -(-logits_BV.numel() // _LOGITS_IN_CACHE) if logits_BV.device.type == "cpu" else 1
    ce = lm = torch.zeros((), device=logits_BV.device)
    gradient = torch.empty_like(logits_BV)
    for rows in _parts(len(logits_BV), max(1, pieces)):
        of_both = logits_BV[rows], None if teacher_BV is None else teacher_BV[rows]
        own_ce, own_lm, gradient[rows] = _terms_of_rows(
            *of_both, student_Bd[rows], teacher[rows], labels_B[rows], scales
        )
        ce, lm = ce + own_ce, lm + own_lm
    return ce, lm, gradient


def _terms_of_rows(
    logits_BV: torch.Tensor,
    teacher_BV: torch.Tensor | None,
    student_Bd: torch.Tensor,
    teacher: TeacherSignal,
    labels_B: torch.Tensor,
    scales: _Scales,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student_BV = logits_BV.float()
    ce, gradient = _softened_terms(student_BV, teacher_BV, student_Bd, teacher, scales)
    asked_for = labels_B != -100
    rows = asked_for.nonzero().squeeze(1)
    log_probabilities = student_BV.log_softmax(dim=-1)
    lm = -log_probabilities[rows, labels_B[rows]].sum()
    gradient.addcmul_(
        log_probabilities.exp_(), asked_for[:, None].to(gradient.dtype), value=scales.lm
    )
    gradient[rows, labels_B[rows]] -= scales.lm
    return ce, lm, gradient


def _softened_terms(
    student_BV: torch.Tensor,
    teacher_BV: torch.Tensor | None,
    student_Bd: torch.Tensor,
    teacher: TeacherSignal,
    scales: _Scales,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of T^2 KL over the rows, and its scaled gradient: a function of its own, so that what it needs is freed with it."""
    temperature = scales.temperature
    log_q = (student_BV / temperature).log_softmax(dim=-1)
    if teacher.product is not None and teacher.entropy is not None:
        normalisers = student_BV[:, 0] / temperature - log_q[:, 0]
        mean_logits = (teacher.product * student_Bd).sum(dim=-1).float()
        ce = (normalisers - mean_logits / temperature - teacher.entropy).sum()
        gradient = log_q.exp_().mul_(scales.ce * temperature)
    elif teacher.samples is not None and teacher.entropy is not None:
        ce = -(log_q.gather(1, teacher.samples).mean(dim=1) + teacher.entropy).sum()
        gradient = log_q.exp_().mul_(scales.ce * temperature)
        share = torch.full_like(
            teacher.samples,
            -scales.ce * temperature / teacher.samples.shape[1],
            dtype=gradient.dtype,
        )
        gradient.scatter_add_(1, teacher.samples, share)
    else:
        log_p = (cast(torch.Tensor, teacher_BV).float() / temperature).log_softmax(dim=-1)
        p = log_p.exp()
        ce = log_p.sub_(log_q).mul_(p).sum()
        gradient = log_q.exp_().sub_(p).mul_(scales.ce * temperature)
    return temperature**2 * ce, gradient


def condensed(
    hidden_Nd: torch.Tensor, head: Head, temperature: float, weight_Vd: torch.Tensor
) -> TeacherSignal:
    """The product of a teacher's distribution with the head's weight, and the entropy, a few positions at a time."""
    products, entropies = [], []
    for part in _parts(len(hidden_Nd), logit_pieces(len(hidden_Nd), len(weight_Vd))):
        log_p = (head(hidden_Nd[part]).float() / temperature).log_softmax(dim=-1)
        p = log_p.exp()
        products.append(p @ weight_Vd.float())
        entropies.append(-(p * log_p).sum(dim=-1))
    return TeacherSignal(product=torch.cat(products), entropy=torch.cat(entropies))


def sampled(
    hidden_Nd: torch.Tensor,
    head: Head,
    vocabulary: int,
    temperature: float,
    uniform_N: torch.Tensor,
    count: int,
) -> TeacherSignal:
    """Tokens drawn from a teacher's distribution, and the entropy, a few positions at a time.

    Draws are systematic: one uniform number places `count` points at equal distances on the cumulative distribution, so that a token of
    probability p comes p times `count` times on average, and never differs from that by one or more. (Independent draws are as right
    on average, and scatter more. Keeping the top tokens alone is not: arXiv 2503.16870.)
    """
    samples, entropies = [], []
    for part in _parts(len(hidden_Nd), logit_pieces(len(hidden_Nd), vocabulary)):
        log_p = (head(hidden_Nd[part]).float() / temperature).log_softmax(dim=-1)
        cumulative = log_p.exp().cumsum(dim=-1)
        points = (
            (uniform_N[part, None] + torch.arange(count, device=log_p.device))
            / count
            * cumulative[:, -1:]
        )
        samples.append(torch.searchsorted(cumulative, points).clamp_(max=log_p.shape[1] - 1))
        entropies.append(-(log_p.exp() * log_p).sum(dim=-1))
    return TeacherSignal(samples=torch.cat(samples), entropy=torch.cat(entropies))


class _WithGradients(torch.autograd.Function):
    """Gives a value the gradients that were computed beside it."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, gradients: list[torch.Tensor], *inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In fp32, for the scale of a loss may be too large a number for fp16.
        return (
            None,
            None,
            *((upstream[0] * gradient.float()).to(gradient.dtype) for gradient in ctx.gradients),
        )
