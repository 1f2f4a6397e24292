"""A student's frozen lower block is the teacher's own: it runs once, in the teacher, and the student goes on from what it made.

Shapes: B sequences, T tokens, d width.
"""

from typing import Any

import torch
from torch import nn

from post_dist.models.language_model import LanguageModel


def take_out_lower_block(student: LanguageModel, layers: int) -> None:
    """From now on the student takes what its lowest layers would make as `below`; they and the embeddings are no longer its own.

    The places of the layers stay, for some families choose a mask by a layer's number. Without layers to take out, nothing changes.
    """
    if not layers:
        return
    in_tuple = layers_give_tuples(student)
    for index in range(layers):
        student.layers[index] = Passage(in_tuple=in_tuple)
    student.model.set_input_embeddings(nn.Identity())


def forward_above(
    student: LanguageModel, below_BTd: torch.Tensor, positions_BT: torch.Tensor | None
) -> torch.Tensor:
    """The last hidden states [B, T, d] of a student without its lower block, from what that made [B, T, d]."""
    (*_, last) = (layer for layer in student.layers if isinstance(layer, Passage))
    last.given = below_BTd  # past whatever the family does to embeddings
    try:
        hidden: torch.Tensor = student(below_BTd, position_ids=positions_BT)
    finally:
        last.given = None
    return hidden


def forward_with_below(
    teacher: LanguageModel,
    layers: int,
    input_ids_BT: torch.Tensor,
    positions_BT: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The teacher's last hidden states [B, T, d], and what its lowest layers made, [B, T, d], or None for no layers."""
    if not layers:
        return teacher(input_ids_BT, position_ids=positions_BT), None
    noted: list[torch.Tensor] = []

    def note(module: nn.Module, given: Any, made: Any) -> None:
        noted.append(made[0] if isinstance(made, tuple) else made)

    hook = teacher.layers[layers - 1].register_forward_hook(note)
    try:
        hidden: torch.Tensor = teacher(input_ids_BT, position_ids=positions_BT)
    finally:
        hook.remove()
    return hidden, noted[-1]


class Passage(nn.Module):
    """Stands in a layer's place: hands on what it is given from outside, or else what comes in."""

    given: torch.Tensor | None = None

    def __init__(self, *, in_tuple: bool) -> None:
        super().__init__()
        self._in_tuple = in_tuple

    def forward(
        self, hidden_states: torch.Tensor, *args: object, **kwargs: object
    ) -> torch.Tensor | tuple[torch.Tensor]:
        """States [B, T, d], as the layer would give them."""
        handed_on = hidden_states if self.given is None else self.given
        return (handed_on,) if self._in_tuple else handed_on


@torch.no_grad()
def layers_give_tuples(model: LanguageModel) -> bool:
    """Whether what a layer gives is the first of a tuple, found by running one. All ranks of a sharded model come here together."""
    found: list[bool] = []
    hook = model.layers[0].register_forward_hook(
        lambda module, given, made: found.append(isinstance(made, tuple))
    )
    try:
        model(torch.full((1, 2), 1, device=model.model.device))
    finally:
        hook.remove()
    return found[0]
