"""Which rows a step reads: a function of the seed and the place alone, so that nothing need be saved to go on."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_BATCHES_SORTED = 8


def shuffled_rows(first: int, count: int, total: int, seed: int) -> list[int]:
    """Rows at places `first` to `first + count` of an endless reading of `total` rows, shuffled anew each time round."""
    return [int(_order(total, seed, place // total)[place % total]) for place in range(first, first + count)]


def rows_of_like_length(step: int, batch_size: int, lengths: Sequence[int], seed: int) -> list[int]:
    """The batch of a step, of rows that are about equally long, so that little is padded.

    Eight batches' worth of shuffled rows are sorted by length and cut into batches, which come in random order.
    """
    window, place = divmod(step, _BATCHES_SORTED)
    rows = shuffled_rows(window * _BATCHES_SORTED * batch_size, _BATCHES_SORTED * batch_size, len(lengths), seed)
    rows.sort(key=lambda row: lengths[row])
    batch = int(np.random.default_rng((seed, window)).permutation(_BATCHES_SORTED)[place])
    return rows[batch * batch_size : (batch + 1) * batch_size]


@lru_cache(maxsize=4)
def _order(total: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(total)
