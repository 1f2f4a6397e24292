"""The losses of distillation and transfer: pure functions of tensors.

Shapes: B rows, K scores (the vocabulary, or a task's classes), N positions, d width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Head = Callable[[torch.Tensor], torch.Tensor]

_SCALING_ROUNDS = 10_000
_SCALING_TOLERANCE = 1e-9
_POSITIONS_AT_ONCE = 512
"""Positions whose logits are alive together: 100 MB at a vocabulary of 50,000 in fp32."""


def softened_kl(teacher_BK: torch.Tensor, student_BK: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(teacher/T) || softmax(student/T)), the mean over rows, in fp32 (paper eq. 1 and 3)."""
    teacher = (teacher_BK.float() / temperature).log_softmax(dim=-1)
    student = (student_BK.float() / temperature).log_softmax(dim=-1)
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def published_transfer_loss(
    source_BK: torch.Tensor,
    source_prompted_BK: torch.Tensor,
    target_BK: torch.Tensor,
    target_prompted_BK: torch.Tensor,
    *,
    alpha: float,
    temperature: float,
) -> torch.Tensor:
    """(1-alpha) L1 + alpha L2 (paper eq. 3 to 5).

    L1 has the prompted target mimic the prompted source; L2 has it change as the source does under its prompt, the
    changes in logits going through the softmax themselves.
    """
    mimic = softened_kl(source_prompted_BK, target_prompted_BK, temperature)
    shift = softened_kl(source_prompted_BK.float() - source_BK.float(), target_prompted_BK.float() - target_BK.float(), temperature)
    return (1 - alpha) * mimic + alpha * shift


def proxy_logits(source_BK: torch.Tensor, source_prompted_BK: torch.Tensor, target_BK: torch.Tensor, strength: float) -> torch.Tensor:
    """z_t(x) + lambda (z_s(p_s+x) - z_s(x)) in fp32: proxy-tuning (Liu et al. 2024), which needs no training."""
    return target_BK.float() + strength * (source_prompted_BK.float() - source_BK.float())


def share_matching_offsets(scores_NC: torch.Tensor, reference_NC: torch.Tensor) -> torch.Tensor:
    """Offsets [C] that give class scores the reference's mean class probabilities over the same rows.

    Adding two models' logit changes also adds their class biases. The prompted student has learned the task's threshold, so
    on public text its mean probabilities say where the proxy's threshold belongs; no label is needed. The fixed point is
    the minimum of a convex function, and iterative scaling finds it.
    """
    scores = scores_NC.double()
    wanted = reference_NC.double().softmax(dim=1).mean(dim=0).log()
    offsets = torch.zeros_like(wanted)
    for _ in range(_SCALING_ROUNDS):
        step = wanted - (scores + offsets).softmax(dim=1).mean(dim=0).log()
        offsets += step
        if step.abs().max() < _SCALING_TOLERANCE:
            break
    return (offsets - offsets.mean()).float()


@dataclass(frozen=True)
class DistillationTerms:
    """The three terms of a batch, each a mean over its positions, without gradient.

    Attributes:
        ce: T^2 KL of the teacher to the student.
        lm: cross-entropy of the labels.
        cos: one minus the cosine of the last hidden states.
    """

    ce: torch.Tensor
    lm: torch.Tensor
    cos: torch.Tensor


def distillation_loss(
    student_Nd: torch.Tensor,
    teacher_Nd: torch.Tensor,
    labels_N: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    *,
    weights: tuple[float, float, float],
    temperature: float,
    head_parameters: tuple[nn.Parameter, ...] = (),
) -> tuple[torch.Tensor, DistillationTerms]:
    """a_ce T^2 KL + a_lm LM + a_cos COS (paper eq. 1), with the logits [N, V] of a few positions alive at a time.

    The gradient with respect to the logits has a closed form, so it is taken back through the head while the logits are
    there; the backward only scales it. No logits are kept or made twice.

    Args:
        student_Nd: last hidden states of the student.
        teacher_Nd: those of the teacher, without gradient.
        labels_N: the token that each position should give; -100 where none is asked for.
        student_head: from hidden states to logits.
        teacher_head: the same of the teacher.
        weights: a_ce, a_lm, a_cos.
        temperature: T.
        head_parameters: those of the student's head that are trained.

    Returns:
        The loss, and its terms.
    """
    a_ce, a_lm, a_cos = weights
    labelled = int((labels_N != -100).sum().clamp(min=1))
    differentiate = torch.is_grad_enabled() and student_Nd.requires_grad
    gradients = [torch.zeros_like(tensor) for tensor in (student_Nd, *head_parameters)] if differentiate else []
    ce = lm = torch.zeros((), device=student_Nd.device)
    for start in range(0, len(student_Nd), _POSITIONS_AT_ONCE):
        part = slice(start, start + _POSITIONS_AT_ONCE)
        hidden = student_Nd[part].detach().requires_grad_(differentiate)
        logits = student_head(hidden)
        with torch.no_grad():
            terms = _logit_terms(
                logits, teacher_head(teacher_Nd[part]), labels_N[part], a_ce / len(student_Nd), a_lm / labelled, temperature
            )
        ce, lm = ce + terms[0], lm + terms[1]
        if differentiate:
            own = torch.autograd.grad(logits, [hidden, *head_parameters], terms[2].to(logits.dtype))
            gradients[0][part] = own[0]
            for total, gradient in zip(gradients[1:], own[1:], strict=True):
                total += gradient
    ce, lm = ce / len(student_Nd), lm / labelled
    vocabulary_loss = a_ce * ce + a_lm * lm
    if differentiate:
        vocabulary_loss = _WithGradients.apply(vocabulary_loss, gradients, student_Nd, *head_parameters)
    cos = 1 - functional.cosine_similarity(student_Nd.float(), teacher_Nd.float(), dim=-1).mean()
    return vocabulary_loss + a_cos * cos, DistillationTerms(ce, lm, cos.detach())


def _logit_terms(
    student_BV: torch.Tensor, teacher_BV: torch.Tensor, labels_B: torch.Tensor, ce_weight: float, lm_weight: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of the two terms over the rows, and the gradient [B, V] of their weighted sum with respect to the student's logits."""
    student = student_BV.float()
    log_q = (student / temperature).log_softmax(dim=-1)
    log_p = (teacher_BV.float() / temperature).log_softmax(dim=-1)
    p = log_p.exp()
    ce = temperature**2 * log_p.sub_(log_q).mul_(p).sum()
    gradient = log_q.exp_().sub_(p).mul_(ce_weight * temperature)
    asked_for = labels_B != -100
    rows = asked_for.nonzero().squeeze(1)
    log_probabilities = student.log_softmax(dim=-1)
    lm = -log_probabilities[rows, labels_B[rows]].sum()
    gradient.addcmul_(log_probabilities.exp_(), asked_for[:, None].to(gradient.dtype), value=lm_weight)
    gradient[rows, labels_B[rows]] -= lm_weight
    return ce, lm, gradient


class _WithGradients(torch.autograd.Function):
    """Gives a value the gradients that were computed beside it."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, gradients: list[torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(upstream[0].to(gradient.dtype) * gradient for gradient in ctx.gradients)


def unexplained_share(student_Nd: torch.Tensor, teacher_Nd: torch.Tensor) -> float:
    """The share of the teacher's centred variance that the student leaves unexplained: 0 is a copy, 1 tells nothing."""
    student, teacher = student_Nd.double(), teacher_Nd.double()
    return float((student - teacher).square().sum() / (teacher - teacher.mean(dim=0)).square().sum())
