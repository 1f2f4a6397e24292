"""What a student gives away of its teacher, for the provider who hands it out."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel


def given_away(
    untrained: PreTrainedModel, trained: Mapping[str, torch.Tensor], teacher_parameters: int
) -> dict[str, int]:
    """Count the teacher's parameters in a student.

    Args:
        untrained: the student before any training: all of its parameters are copies.
        trained: the weights after the training, by the names of `untrained`. Those that are missing
            were not trained.
        teacher_parameters: number of parameters of the teacher.

    Returns:
        The number of parameters of the student and of the teacher, and of those in the student that
        still equal the teacher's, bit for bit.
    """
    size = 0
    changed = 0
    for name, copied in untrained.named_parameters():
        size += copied.numel()
        # In the teacher's precision a small update may round to no change at all.
        if name in trained and not torch.equal(trained[name].to(copied.dtype), copied):
            changed += copied.numel()
    return {
        "student_parameters": size,
        "unchanged_parameters": size - changed,
        "teacher_parameters": teacher_parameters,
    }
