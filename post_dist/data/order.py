"""Which rows a step reads: a function of the seed and the place alone, so that nothing need be saved to go on."""

from functools import lru_cache

import numpy as np


def shuffled_rows(first: int, count: int, total: int, seed: int) -> list[int]:
    """Rows at places `first` to `first + count` of an endless reading of `total` rows, shuffled anew each time round."""
    return [int(_order(total, seed, place // total)[place % total]) for place in range(first, first + count)]


@lru_cache(maxsize=4)
def _order(total: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(total)
