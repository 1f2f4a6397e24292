"""Divergences between a teacher and a student, shared by distillation and transfer.

Shapes: B rows, K scores (the vocabulary, or the classes of a task), N positions, d width.
"""

import torch
from torch.nn import functional


def softened_kl(
    teacher_BK: torch.Tensor,
    student_BK: torch.Tensor,
    temperature: float,
    shares_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute T^2 KL(softmax(teacher / T) || softmax(student / T)) in fp32 (paper eq. 1 and 3).

    Args:
        teacher_BK: logits of the teacher, whose distribution is to be matched.
        student_BK: logits of the student.
        temperature: T.
        shares_B: weight of each row; None takes the mean over rows.

    Returns:
        A scalar.
    """
    # In fp32, because bf16 keeps too few digits of a small divergence.
    log_p_BK = (teacher_BK.float() / temperature).log_softmax(dim=-1)
    log_q_BK = (student_BK.float() / temperature).log_softmax(dim=-1)
    if shares_B is None:
        mean = functional.kl_div(log_q_BK, log_p_BK, reduction="batchmean", log_target=True)
        return temperature**2 * mean
    # With weights, compute the divergence of each row first.
    kl_B = functional.kl_div(log_q_BK, log_p_BK, reduction="none", log_target=True).sum(dim=-1)
    return temperature**2 * shares_B @ kl_B


def unexplained_share(student_Nd: torch.Tensor, teacher_Nd: torch.Tensor) -> float:
    """Compute the fraction of the teacher's variance that the student leaves unexplained.

    It is 0 for a copy of the teacher, and 1 for a student that always predicts the teacher's mean.
    """
    # In fp64, because both sums run over all positions of the held-out split.
    student = student_Nd.double()
    teacher = teacher_Nd.double()
    error = (student - teacher).square().sum()
    variance = (teacher - teacher.mean(dim=0)).square().sum()
    return float(error / variance)
