"""The interface from which a training step gets the teacher's signal.

`OnlineTeacher` runs the teacher in every step. `CachedTeacher` reads files that are written once.

Shapes: B sequences, T tokens.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from post_dist.losses.signals import TeacherSignal


class SignalSource(Protocol):
    """A source of the teacher's signal for sequences of the corpus."""

    def prepare(self, step: int) -> None:
        """Wait until the signals of a training step can be had. All ranks call it before the step.

        Raises:
            Interrupted: a rank was asked to stop.
        """

    def finish(self) -> None:
        """Remove what only this run could use. All ranks call it after the last checkpoint."""

    def signals_of(
        self,
        numbers: Sequence[int],
        input_ids_BT: torch.Tensor,
        positions_BT: torch.Tensor | None,
    ) -> TeacherSignal:
        """Return the signal, each tensor [B, T, ...]. All ranks call it equally often.

        Args:
            numbers: the numbers of the B sequences in the corpus.
            input_ids_BT: their tokens, as the student reads them.
            positions_BT: positions of the tokens where documents are kept apart, else None.
        """
