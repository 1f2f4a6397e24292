"""The lower layers of a model: run once, and left out where their output is known.

The frozen lower block of a student consists of the teacher's own first layers. Both models would
compute the same hidden states, so the student takes the teacher's.

Shapes: B sequences, T tokens, d width.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from post_dist.models.language_model import LanguageModel


def take_out_lower_block(student: LanguageModel, layers: int) -> None:
    """Replace the lowest layers and the embeddings, so that the student starts after them.

    Each layer is replaced and not removed, because some families choose a layer's attention mask by
    its index. Nothing changes for 0 layers.
    """
    if not layers:
        return
    # Call this before any layer is replaced, because it runs the student's first layer.
    num_outputs = count_layer_outputs(student)
    for index in range(layers):
        student.layers[index] = SkippedLayer(num_outputs=num_outputs)
    # Nothing would read the embeddings, so they are not computed.
    student.model.set_input_embeddings(nn.Identity())


def forward_above(
    student: LanguageModel, below_BTd: torch.Tensor, positions_BT: torch.Tensor | None
) -> torch.Tensor:
    """Run a student from the output of the lower block.

    Args:
        student: a student after `take_out_lower_block`.
        below_BTd: output of the block, computed by the teacher.
        positions_BT: positions of the tokens if packed documents are kept separate, else None.

    Returns:
        The student's last hidden states [B, T, d].
    """
    skipped_layers = [layer for layer in student.layers if isinstance(layer, SkippedLayer)]
    last = skipped_layers[-1]
    # Put in at the last replaced layer: before it, some families scale or normalize embeddings.
    last.given = below_BTd
    try:
        hidden_BTd: torch.Tensor = student(below_BTd, position_ids=positions_BT)
    finally:
        last.given = None
    return hidden_BTd


def forward_with_below(
    teacher: LanguageModel,
    layers: int,
    input_ids_BT: torch.Tensor,
    positions_BT: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the trunk of a teacher, and also return the output of the lower block.

    Args:
        teacher: the teacher with all its layers.
        layers: number of layers in the lower block.
        input_ids_BT: the tokens.
        positions_BT: positions of the tokens if packed documents are kept separate, else None.

    Returns:
        The last hidden states [B, T, d], and the output of the lower block [B, T, d]. The latter is
        None for a block of 0 layers.
    """
    if not layers:
        return teacher(input_ids_BT, position_ids=positions_BT), None
    with outputs_of(teacher, layers - 1) as outputs:
        hidden_BTd: torch.Tensor = teacher(input_ids_BT, position_ids=positions_BT)
    return hidden_BTd, outputs[-1]


@contextmanager
def outputs_of(model: LanguageModel, layer: int) -> Iterator[list[torch.Tensor]]:
    """Collect what a layer gives in each forward pass inside this context, each [B, T, d]."""
    outputs: list[torch.Tensor] = []

    def keep_output(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple | list) else output
        outputs.append(hidden)

    hook = model.layers[layer].register_forward_hook(keep_output)
    try:
        yield outputs
    finally:
        hook.remove()


@contextmanager
def without_layers(
    model: LanguageModel, skipped: Iterable[int], *, num_outputs: int
) -> Iterator[dict[int, "SkippedLayer"]]:
    """Skip layers of a model inside this context.

    Args:
        model: the model.
        skipped: the layers, counted from 0.
        num_outputs: what `count_layer_outputs` says of the model.

    Yields:
        What stands in place of each layer, by its number.
    """
    removed = {layer: model.layers[layer] for layer in skipped}
    stand_ins = {layer: SkippedLayer(num_outputs=num_outputs) for layer in removed}
    for layer, stand_in in stand_ins.items():
        model.layers[layer] = stand_in
    try:
        yield stand_ins
    finally:
        for layer, module in removed.items():
            model.layers[layer] = module


class SkippedLayer(nn.Module):
    """Replaces a layer, and returns its input or the tensor `given`.

    Args:
        num_outputs: what `count_layer_outputs` says of the family.
    """

    given: torch.Tensor | None = None
    """Hidden states to return in place of the input."""

    def __init__(self, *, num_outputs: int) -> None:
        super().__init__()
        self._num_outputs = num_outputs

    def forward(
        self, hidden_states: torch.Tensor, *args: object, **kwargs: object
    ) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        """Return hidden states [B, T, d], in a tuple if the replaced layer returns a tuple."""
        output = hidden_states if self.given is None else self.given
        if not self._num_outputs:
            return output
        # Behind the hidden states are attention weights, which nobody asks for.
        return (output, *[None] * (self._num_outputs - 1))


@torch.no_grad()
def count_layer_outputs(model: LanguageModel) -> int:
    """Run the model once, and return how many values its layers return; 0 if they return no tuple.

    All ranks of a sharded model must call it together.
    """
    found: list[int] = []

    def keep_kind(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(len(output) if isinstance(output, tuple | list) else 0)

    hook = model.layers[0].register_forward_hook(keep_kind)
    try:
        model(torch.full((1, 2), 1, device=model.model.device))
    finally:
        hook.remove()
    return found[0]
