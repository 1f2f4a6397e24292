"""Run the MLP of the last layer only at the answers. No layer reads its other positions.

Shapes: B examples, d width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def run_at(mlp: nn.Module | None, rows_B: torch.Tensor, places_B: torch.Tensor) -> Iterator[None]:
    """Run an MLP only at the given positions inside this context; elsewhere it outputs zeros.

    An MLP is about two thirds of a layer's cost. That matters for a student of a few layers.

    Args:
        mlp: the MLP of the last layer; None changes nothing.
        rows_B: row of each position in the batch.
        places_B: place of each position in its row.
    """
    if mlp is None:
        yield
        return
    # The first hook stores the shape [rows, length], which the second hook restores.
    whole = torch.Size()

    def pick(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal whole
        whole = inputs[0].shape[:2]
        return (inputs[0][rows_B, places_B][:, None], *inputs[1:])

    def put_back(
        module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        # The layer adds this to its residual stream, so it must have the full shape.
        zeros = output.new_zeros(*whole, output.shape[-1])
        return zeros.index_put((rows_B, places_B), output[:, 0])

    hooks = [mlp.register_forward_pre_hook(pick), mlp.register_forward_hook(put_back)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
