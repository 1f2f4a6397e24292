"""Run the MLP of the last layer only at the answers. No layer reads its other positions.

Shapes: B examples, d width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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

    def at_answers(value: Any) -> Any:
        # BLOOM also gives its MLP the residual stream.
        if isinstance(value, torch.Tensor) and value.shape[:2] == whole:
            return value[rows_B, places_B][:, None]
        return value

    def pick(
        module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal whole
        whole = inputs[0].shape[:2]
        return tuple(map(at_answers, inputs)), {name: at_answers(named[name]) for name in named}

    def put_back(
        module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        # Some mixtures of experts also return the scores of their router.
        hidden, *others = output if isinstance(output, tuple) else (output,)
        # The layer adds this to its residual stream, so it must have the full shape.
        zeros = hidden.new_zeros(*whole, hidden.shape[-1])
        put = zeros.index_put((rows_B, places_B), hidden[:, 0])
        return (put, *others) if isinstance(output, tuple) else put

    hooks = [
        mlp.register_forward_pre_hook(pick, with_kwargs=True),
        mlp.register_forward_hook(put_back),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
