"""Divergences between a teacher and a student, shared by distillation and transfer."""

import torch
from torch.nn import functional


def softened_kl(
    teacher_BK: torch.Tensor,
    student_BK: torch.Tensor,
    temperature: float,
    shares_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """T^2 KL(softmax(teacher/T) || softmax(student/T)) in fp32 (paper eq. 1 and 3): the mean over rows, or their sum by shares."""
    teacher = (teacher_BK.float() / temperature).log_softmax(dim=-1)
    student = (student_BK.float() / temperature).log_softmax(dim=-1)
    if shares_B is None:
        return temperature**2 * functional.kl_div(
            student, teacher, reduction="batchmean", log_target=True
        )
    return (
        temperature**2
        * shares_B
        @ functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    )


def unexplained_share(student_Nd: torch.Tensor, teacher_Nd: torch.Tensor) -> float:
    """The share of the teacher's centred variance that the student leaves unexplained: 0 is a copy, 1 tells nothing."""
    student, teacher = student_Nd.double(), teacher_Nd.double()
    return float(
        (student - teacher).square().sum() / (teacher - teacher.mean(dim=0)).square().sum()
    )
