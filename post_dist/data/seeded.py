"""Random generators that depend on a seed and on the number of an item alone."""

import torch

_SEED_FACTOR = 1_000_003
"""A prime, so that different seeds and numbers do not give the same generator."""


def seeded_generator(seed: int, number: int) -> torch.Generator:
    """Return the generator of one item, such as a sequence; nothing need be saved to resume."""
    return torch.Generator().manual_seed(seed * _SEED_FACTOR + number)
