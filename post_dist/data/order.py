"""Compute which examples a step reads, as a function of seed and step alone.

A resumed run therefore needs no saved state of its data. The order does not depend on the number of
ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_BATCHES_SORTED = 8
"""Number of batches whose examples are sorted together by length."""


@dataclass(frozen=True)
class RankBatch:
    """The examples in one forward pass of a rank: its part of a batch that all ranks share.

    A sharded model needs equally many forward and backward passes on every rank. A rank that has
    run out of examples therefore repeats one of them, with a weight of 0.

    Attributes:
        rows: numbers of the examples, at least one.
        weight: factor for a mean over `rows`. The weighted means of all ranks and rank batches
            average to the mean over all examples.
    """

    rows: list[int]
    weight: float

    @property
    def counted(self) -> int:
        """Number of examples that count: all of them, or 0 for a repeated example."""
        return len(self.rows) if self.weight else 0


def rank_batches(rows: Sequence[int], at_most: int, rank: int, ranks: int) -> list[RankBatch]:
    """Return one rank's part of a batch. Every rank gets equally many rank batches.

    Args:
        rows: numbers of the examples in the batch.
        at_most: most examples in one rank batch.
        rank: the rank.
        ranks: number of ranks.
    """
    # Small batches are spread over all ranks before any rank gets more.
    size = min(at_most, math.ceil(len(rows) / ranks))
    rounds = math.ceil(len(rows) / (size * ranks))
    # Ranks take turns, so in each round they run neighboring examples.
    batches = []
    for round_number in range(rounds):
        start = (round_number * ranks + rank) * size
        own = list(rows[start : start + size])
        # The weight is 0 for a rank that has run out of examples.
        weight = len(own) * rounds * ranks / len(rows)
        batches.append(RankBatch(own or [rows[0]], weight))
    return batches


def shuffled_rows(first: int, count: int, total: int, seed: int) -> list[int]:
    """Return numbers of examples from an endless reading order, shuffled anew in each epoch.

    Args:
        first: place in the reading order of the first example to return.
        count: number of examples to return.
        total: number of all examples.
        seed: seed of the shuffles.
    """
    rows = []
    for place in range(first, first + count):
        epoch, place_in_epoch = divmod(place, total)
        rows.append(int(_order(total, seed, epoch)[place_in_epoch]))
    return rows


@lru_cache(maxsize=1)
def first_places(total: int, seed: int) -> np.ndarray:
    """Return the place of each example in the first epoch: 4 bytes an example below 2^32."""
    # Sequences are looked up one at a time, so the inverse is computed once.
    order = _order(total, seed, 0)
    places = np.empty_like(order)
    places[order] = np.arange(total, dtype=order.dtype)
    return places


def rows_of_like_length(step: int, batch_size: int, lengths: Sequence[int], seed: int) -> list[int]:
    """Return the batch of a step, with examples of similar length to keep padding short.

    The shuffled examples of eight batches are sorted by length and cut into batches. These batches
    follow in random order.

    Args:
        step: number of the step.
        batch_size: examples in a batch.
        lengths: number of tokens of each example.
        seed: seed of the shuffles.
    """
    # Only a window of batches is sorted. Sorting all examples would give all epochs the same order.
    window, place = divmod(step, _BATCHES_SORTED)
    window_size = _BATCHES_SORTED * batch_size
    rows = shuffled_rows(window * window_size, window_size, len(lengths), seed)
    rows.sort(key=lambda row: lengths[row])
    # Without a random order, every window would go from short texts to long ones.
    batch = int(np.random.default_rng((seed, window)).permutation(_BATCHES_SORTED)[place])
    return rows[batch * batch_size : (batch + 1) * batch_size]


@lru_cache(maxsize=4)
def _order(total: int, seed: int, epoch: int) -> np.ndarray:
    """Return the shuffled order of one epoch. It is cached, because each example looks it up."""
    # Four bytes a number, because a large corpus has hundreds of millions of sequences. The order
    # does not depend on the type.
    numbers = np.arange(total, dtype=np.uint32 if total < 1 << 32 else np.int64)
    return np.random.default_rng((seed, epoch)).permutation(numbers)
