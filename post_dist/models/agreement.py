"""Whether two results of a model are equal up to rounding."""

import torch

_RELATIVE_TOLERANCE = 1e-2
"""Relative difference that rounding in bf16 explains. A real difference is far larger."""


def agree(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether two results of a model are equal up to rounding in half precision."""
    largest = float(expected.abs().max())
    return torch.allclose(
        ours, expected, rtol=_RELATIVE_TOLERANCE, atol=_RELATIVE_TOLERANCE * largest
    )
