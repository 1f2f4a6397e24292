"""The losses of distillation and transfer: pure functions of tensors.

Shapes: B rows, K scores (the vocabulary, or a task's classes), N positions, d width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

Head = Callable[[torch.Tensor], torch.Tensor]

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


@dataclass(frozen=True)
class DistillationTerms:
    """The three terms of a batch, each a mean over its positions.

    Attributes:
        ce: T^2 KL of the teacher to the student.
        lm: cross-entropy of the labels.
        cos: one minus the cosine of the last hidden states.
    """

    ce: torch.Tensor
    lm: torch.Tensor
    cos: torch.Tensor

    def weighted(self, alpha_ce: float, alpha_lm: float, alpha_cos: float) -> torch.Tensor:
        """a_ce CE + a_lm LM + a_cos COS (paper eq. 1)."""
        return alpha_ce * self.ce + alpha_lm * self.lm + alpha_cos * self.cos


def distillation_terms(
    student_Nd: torch.Tensor,
    teacher_Nd: torch.Tensor,
    labels_N: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    *,
    temperature: float,
) -> DistillationTerms:
    """The terms of the distillation loss, with the logits [N, V] of a few positions at a time.

    Args:
        student_Nd: last hidden states of the student.
        teacher_Nd: those of the teacher, without gradient.
        labels_N: the token that each position should give; -100 where none is asked for.
        student_head: from hidden states to logits.
        teacher_head: the same of the teacher.
        temperature: T.
    """

    def sums(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        student_logits = student_head(student)
        with torch.no_grad():
            teacher_logits = teacher_head(teacher)
        ce = softened_kl(teacher_logits, student_logits, temperature) * len(student)
        lm = functional.cross_entropy(student_logits.float(), labels, ignore_index=-100, reduction="sum")
        return ce, lm

    ce = student_Nd.new_zeros((), dtype=torch.float32)
    lm = torch.zeros_like(ce)
    for start in range(0, len(student_Nd), _POSITIONS_AT_ONCE):
        part = slice(start, start + _POSITIONS_AT_ONCE)
        # Recomputed in the backward, so that no more than one part's logits are ever alive.
        part_ce, part_lm = checkpoint(
            sums, student_Nd[part], teacher_Nd[part], labels_N[part], use_reentrant=False, determinism_check="none"
        )
        ce, lm = ce + part_ce, lm + part_lm
    cosine = functional.cosine_similarity(student_Nd.float(), teacher_Nd.float(), dim=-1)
    asked_for = (labels_N != -100).sum().clamp(min=1)
    return DistillationTerms(ce / len(student_Nd), lm / asked_for, 1 - cosine.mean())


def unexplained_share(student_Nd: torch.Tensor, teacher_Nd: torch.Tensor) -> float:
    """The share of the teacher's centred variance that the student leaves unexplained: 0 is a copy, 1 tells nothing."""
    student, teacher = student_Nd.double(), teacher_Nd.double()
    return float((student - teacher).square().sum() / (teacher - teacher.mean(dim=0)).square().sum())
