"""What a student gives away of its teacher, for the provider who hands it out."""

import math
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

_LARGEST_LOSS = 700.0


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


def perplexities(held_out: Mapping[str, float], attacks: Mapping[int, float]) -> dict[str, float]:
    """Compare the student with its teacher as language models, on held-out text.

    Args:
        held_out: metrics of the student, with the language-modeling losses of both models in nats.
        attacks: the loss of a copy of the student that was distilled further, by the number of
            tokens (see `attack.py`).

    Returns:
        The perplexity of each model by its name. Of a masked model it is that of masked tokens.
    """
    losses = {"teacher": held_out["teacher_lm"], "student": held_out["lm"]}
    for tokens, loss in attacks.items():
        losses[f"student after {tokens} more tokens"] = loss
    # The perplexity of a broken model may exceed every float. Its loss may be no number, which is
    # not below the largest one.
    return {name: math.exp(min(_LARGEST_LOSS, loss)) for name, loss in losses.items()}
