"""Run the MLP of the last layer at the answers alone: no later layer reads its other positions.

Shapes: B examples, d width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def run_at(mlp: nn.Module | None, rows_B: torch.Tensor, places_B: torch.Tensor) -> Iterator[None]:
    """Run an MLP at the given positions only, while the body runs; elsewhere its output is zero.

    An MLP is two thirds of a layer, which counts in a student of a few layers.

    Args:
        mlp: the MLP of the last layer, or None to change nothing.
        rows_B: row of each position in the batch.
        places_B: place of each position in its row.
    """
    if mlp is None:
        yield
        return
    # The first hook learns the shape that the second one restores.
    whole = torch.Size()

    def pick(module: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal whole
        whole = given[0].shape[:2]
        return (given[0][rows_B, places_B][:, None], *given[1:])

    def put_back(
        module: nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor
    ) -> torch.Tensor:
        # The layer adds this to its residual stream, so it must have the shape of the whole.
        zeros = made.new_zeros(*whole, made.shape[-1])
        return zeros.index_put((rows_B, places_B), made[:, 0])

    hooks = [mlp.register_forward_pre_hook(pick), mlp.register_forward_hook(put_back)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
