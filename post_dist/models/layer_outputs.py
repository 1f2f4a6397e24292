"""Read the outputs of some layers during a forward pass."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from post_dist.errors import InputError


@contextmanager
def outputs_of(layers: Iterable[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Collect the hidden states that layers return inside this context.

    Args:
        layers: the layers, in the order in which they run.

    Yields:
        A list, which the forward pass fills with one tensor [rows, length, d] for each layer.

    Raises:
        InputError: a layer returns anything else.
    """
    collected: list[torch.Tensor] = []

    def collect(module: nn.Module, inputs: Any, output: Any) -> None:
        # Layers of some families also return their attention weights or keys and values.
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3:
            raise InputError(
                f"a head cannot read the layers of this model: {type(module).__name__} does not "
                "return one hidden state for each token",
                "set warm_start.head_layers to 1",
            )
        collected.append(hidden)

    hooks = [layer.register_forward_hook(collect) for layer in layers]
    try:
        yield collected
    finally:
        for hook in hooks:
            hook.remove()
