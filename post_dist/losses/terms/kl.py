"""The KL divergence between teacher and student, both softened by a temperature.

Shapes: B positions of one chunk, N positions of the batch, d width, V vocabulary, S samples.
"""

from typing import cast

import torch

from post_dist.losses.signals import ProjectedSignal, SampledSignal, TeacherSignal
from post_dist.losses.terms.base import LogitChunk, LogitTerm


class TeacherKl(LogitTerm):
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the first term of the paper's eq. 1."""

    metric = "ce"
    weight_field = "alpha_ce"

    def positions(self, labels_N: torch.Tensor) -> int:
        """Return the number of all positions, because the teacher predicts a token at each."""
        return len(labels_N)

    def sum_and_gradient(
        self, chunk: LogitChunk, scale: float, gradient_BV: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the sum over a chunk, and add the gradient: scale T (student - teacher).

        Args:
            chunk: the logits.
            scale: factor of the gradient.
            gradient_BV: gradient of earlier terms, or None.
        """
        # All three functions below need the student's softened log-probabilities. Each may
        # overwrite them, because nothing reads them afterwards.
        log_q_BV = (chunk.student_BV / chunk.temperature).log_softmax(dim=-1)
        # The factor T^2 of the loss times the factor 1 / T of the softened logits is T.
        factor = scale * chunk.temperature
        teacher = chunk.teacher
        if isinstance(teacher, ProjectedSignal):
            kl, own_BV = _from_projection(chunk, teacher, log_q_BV, factor)
        elif isinstance(teacher, SampledSignal):
            kl, own_BV = _from_samples(teacher, log_q_BV, factor)
        else:
            kl, own_BV = _from_logits(chunk, log_q_BV, factor)
        # The first term's tensor becomes the sum, so no tensor of zeros is allocated.
        if gradient_BV is not None:
            own_BV = gradient_BV.add_(own_BV)
        return chunk.temperature**2 * kl, own_BV

    def gradient_of_hidden(
        self, teacher: TeacherSignal, scale: float, temperature: float
    ) -> torch.Tensor | None:
        """Return the teacher's part of a projected signal's gradient, which needs no logits.

        Args:
            teacher: the signal at all N positions.
            scale: factor of the gradient.
            temperature: T of the softened distributions.
        """
        if isinstance(teacher, ProjectedSignal):
            return -scale * temperature * teacher.product
        return None


def _from_logits(
    chunk: LogitChunk, log_q_BV: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL and gradient from the teacher's logits. `log_q_BV` is overwritten."""
    teacher_BV = cast(torch.Tensor, chunk.teacher_BV)
    # In fp32 even for bf16 logits, because the divergence of a good student is small.
    log_p_BV = (teacher_BV.float() / chunk.temperature).log_softmax(dim=-1)
    p_BV = log_p_BV.exp()
    # In place, because every copy is a tensor [B, V].
    kl = log_p_BV.sub_(log_q_BV).mul_(p_BV).sum()
    return kl, log_q_BV.exp_().sub_(p_BV).mul_(factor)


def _from_projection(
    chunk: LogitChunk, teacher: ProjectedSignal, log_q_BV: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL and gradient from a projected signal, except the teacher's part of the gradient.

    KL = log Z - mean logit / T - entropy. Here log Z normalizes the student's distribution. The
    mean of the student's logits is under the teacher's distribution. `TeacherKl.gradient_of_hidden`
    gives the missing part of the gradient. `log_q_BV` is overwritten.
    """
    # Any token gives log Z; this takes the first one.
    log_z_B = chunk.student_BV[:, 0] / chunk.temperature - log_q_BV[:, 0]
    mean_logits_B = (teacher.product * chunk.student_Bd).sum(dim=-1).float()
    kl = (log_z_B - mean_logits_B / chunk.temperature - teacher.entropy).sum()
    return kl, log_q_BV.exp_().mul_(factor)


def _from_samples(
    teacher: SampledSignal, log_q_BV: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL and gradient from sampled tokens of equal weight. `log_q_BV` is overwritten."""
    # The cross-entropy is a mean over samples. The entropy is exact.
    mean_log_q_B = log_q_BV.gather(1, teacher.samples).mean(dim=1)
    kl = -(mean_log_q_B + teacher.entropy).sum()
    gradient_BV = log_q_BV.exp_().mul_(factor)
    # Subtract the teacher's part of the gradient, an equal share for each sample. A token may be
    # drawn several times, so scatter_add_ adds up its shares.
    count = teacher.samples.shape[1]
    shares = torch.full_like(teacher.samples, -factor / count, dtype=gradient_BV.dtype)
    gradient_BV.scatter_add_(1, teacher.samples, shares)
    return kl, gradient_BV
