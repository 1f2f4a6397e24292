"""The output heads that a loss runs: from hidden states [..., d] to logits [..., V]."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Head = Callable[[torch.Tensor], torch.Tensor]
"""Computes logits [..., V] of hidden states [..., d]."""


@dataclass(frozen=True)
class Heads:
    """The heads of a student and its teacher.

    Attributes:
        student: the student's head.
        teacher: the teacher's head. It runs only where the signal holds nothing but hidden states.
        trained: the parameters of the student's head that are trained; empty for a frozen head.
    """

    student: Head
    teacher: Head
    trained: tuple[nn.Parameter, ...] = ()
