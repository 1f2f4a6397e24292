"""Whether two results of a model are equal up to rounding."""

import math

import torch

_RELATIVE_TOLERANCE = 1e-2
"""Relative difference that rounding in bf16 explains. A real difference is far larger."""


def agree(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether two results of a model are equal up to rounding in half precision."""
    largest = float(expected.abs().max())
    # Nothing is equal to a value that is no number, and no tolerance can be one.
    if not math.isfinite(largest):
        return False
    return torch.allclose(
        ours, expected, rtol=_RELATIVE_TOLERANCE, atol=_RELATIVE_TOLERANCE * largest
    )
