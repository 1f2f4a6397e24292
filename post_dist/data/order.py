"""Which rows a step reads: a function of the seed and the place alone, so that nothing need be saved to go on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_BATCHES_SORTED = 8


@dataclass(frozen=True)
class RankBatch:
    """What one rank runs at once of rows that all ranks share.

    Attributes:
        rows: at least one; a rank that has run out gets one of the rows again.
        weight: the mean, over ranks and shares, of `weight` times a mean over `rows` is the mean over all rows. 0 for a row that
            only stands in: a sharded model needs equally many forwards and backwards on every rank.
    """

    rows: list[int]
    weight: float

    @property
    def counted(self) -> int:
        """How many of the rows count."""
        return len(self.rows) if self.weight else 0


def rank_batches(rows: Sequence[int], at_most: int, rank: int, ranks: int) -> list[RankBatch]:
    """One rank's part of `rows`, at most so many at once; every rank gets equally many shares, whatever divides by what."""
    size = min(at_most, -(-len(rows) // ranks))
    rounds = -(-len(rows) // (size * ranks))
    own = [
        list(rows[start : start + size])
        for start in range(rank * size, rounds * ranks * size, ranks * size)
    ]
    return [RankBatch(part or [rows[0]], len(part) * rounds * ranks / len(rows)) for part in own]


def shuffled_rows(first: int, count: int, total: int, seed: int) -> list[int]:
    """Rows at places `first` to `first + count` of an endless reading of `total` rows, shuffled anew each time round."""
    return [
        int(_order(total, seed, place // total)[place % total])
        for place in range(first, first + count)
    ]


def rows_of_like_length(step: int, batch_size: int, lengths: Sequence[int], seed: int) -> list[int]:
    """The batch of a step, of rows that are about equally long, so that little is padded.

    Eight batches' worth of shuffled rows are sorted by length and cut into batches, which come in random order.
    """
    window, place = divmod(step, _BATCHES_SORTED)
    rows = shuffled_rows(
        window * _BATCHES_SORTED * batch_size, _BATCHES_SORTED * batch_size, len(lengths), seed
    )
    rows.sort(key=lambda row: lengths[row])
    batch = int(np.random.default_rng((seed, window)).permutation(_BATCHES_SORTED)[place])
    return rows[batch * batch_size : (batch + 1) * batch_size]


@lru_cache(maxsize=4)
def _order(total: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(total)
