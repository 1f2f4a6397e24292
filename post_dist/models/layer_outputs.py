"""Read the outputs of some layers during a forward pass.

Shapes: B examples, d width.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from post_dist.errors import InputError


@contextmanager
def outputs_at(
    layers: Iterable[nn.Module], rows_B: torch.Tensor, places_B: torch.Tensor
) -> Iterator[list[torch.Tensor]]:
    """Collect the hidden states that layers return at some positions inside this context.

    Args:
        layers: the layers, in the order in which they run.
        rows_B: row of each position in the batch.
        places_B: place of each position in its row.

    Yields:
        A list, which the forward pass fills with one tensor [B, d] for each layer.

    Raises:
        InputError: a layer returns anything else.
    """
    collected: list[torch.Tensor] = []

    def collect(module: nn.Module, inputs: Any, output: Any) -> None:
        # Layers of some families also return their attention weights or keys and values.
        hidden = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3:
            raise InputError(
                f"a head cannot read the layers of this model: {type(module).__name__} does not "
                "return one hidden state for each token",
                "set warm_start.head_layers to 1, and transfer.adapter to prompt or lora",
            )
        # The states of whole texts would fill the memory when many layers are read.
        collected.append(hidden[rows_B, places_B])

    hooks = [layer.register_forward_hook(collect) for layer in layers]
    try:
        yield collected
    finally:
        for hook in hooks:
            hook.remove()
