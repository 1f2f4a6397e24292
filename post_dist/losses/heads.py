"""Output heads, which compute logits [..., V] from hidden states [..., d]."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Head = Callable[[torch.Tensor], torch.Tensor]
"""Function from hidden states [..., d] to logits [..., V]."""


@dataclass(frozen=True)
class Heads:
    """The heads of a student and its teacher.

    Attributes:
        student: the student's head.
        teacher: the teacher's head. It runs only if the signal is a `HiddenSignal`.
        trained: the trained parameters of the student's head; empty for a frozen head.
    """

    student: Head
    teacher: Head
    trained: tuple[nn.Parameter, ...] = ()
