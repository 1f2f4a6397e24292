"""A signal source that runs the teacher in every step.

Shapes: B sequences, T tokens.
"""

from collections.abc import Sequence

import torch

from post_dist.losses.signals import HiddenSignal
from post_dist.models.language_model import LanguageModel
from post_dist.models.lower_block import forward_with_below


class OnlineTeacher:
    """Runs the teacher without its head for each batch, and stores nothing.

    The teacher's head is loaded with the model but never runs here. The student starts with a copy
    of it, and `DistillationModel.teacher_logits` uses that copy. The teacher's own head may be
    sharded and would have to be gathered for every piece of positions.

    Args:
        teacher: the teacher, perhaps sharded.
        lower_layers: number of first layers that the student shares and does not run itself.
    """

    def __init__(self, teacher: LanguageModel, lower_layers: int) -> None:
        # Without an answer position the model skips its head, so only the trunk runs.
        self._trunk = teacher
        self._lower_layers = lower_layers

    def prepare(self, step: int) -> None:
        """Do nothing: the teacher runs in the step."""

    def finish(self) -> None:
        """Do nothing: there is nothing to remove."""

    @torch.no_grad()
    def signals_of(
        self,
        numbers: Sequence[int],
        input_ids_BT: torch.Tensor,
        positions_BT: torch.Tensor | None,
    ) -> HiddenSignal:
        """Return the teacher's hidden states, each tensor [B, T, d]. All ranks call it together.

        Args:
            numbers: not used.
            input_ids_BT: the tokens.
            positions_BT: positions of the tokens where documents are kept apart, else None.
        """
        hidden_BTd, below_BTd = forward_with_below(
            self._trunk, self._lower_layers, input_ids_BT, positions_BT
        )
        return HiddenSignal(hidden=hidden_BTd, below=below_BTd)
