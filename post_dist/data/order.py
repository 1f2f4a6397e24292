"""Which examples a step reads: a function of the seed and the step alone.

A run that resumes therefore needs no saved state of its data, and the order does not depend on the
number of ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_BATCHES_SORTED = 8
"""Batches whose examples are sorted together by length."""


@dataclass(frozen=True)
class RankBatch:
    """What one rank runs at once, of examples that all ranks share.

    Attributes:
        rows: numbers of the examples, at least one. A rank that has run out repeats one of them.
        weight: the mean, over ranks and rank batches, of `weight` times a mean over `rows` is the
            mean over all examples. It is 0 for a repeated example: a sharded model needs equally
            many forward and backward passes on every rank.
    """

    rows: list[int]
    weight: float

    @property
    def counted(self) -> int:
        """Number of examples that count."""
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
    # Ranks take turns, so that in each round they run neighboring examples.
    batches = []
    for round_number in range(rounds):
        start = (round_number * ranks + rank) * size
        own = list(rows[start : start + size])
        # A rank that has run out has no examples of its own, and the weight 0.
        weight = len(own) * rounds * ranks / len(rows)
        batches.append(RankBatch(own or [rows[0]], weight))
    return batches


def shuffled_rows(first: int, count: int, total: int, seed: int) -> list[int]:
    """Return examples from an endless reading that shuffles them anew in each epoch.

    Args:
        first: place in the reading of the first one to return.
        count: how many to return.
        total: number of examples.
        seed: seed of the shuffles.
    """
    rows = []
    for place in range(first, first + count):
        epoch, place_in_epoch = divmod(place, total)
        rows.append(int(_order(total, seed, epoch)[place_in_epoch]))
    return rows


def rows_of_like_length(step: int, batch_size: int, lengths: Sequence[int], seed: int) -> list[int]:
    """Return the batch of a step, of examples of similar length, so that little is padded.

    The shuffled examples of eight batches are sorted by length and cut into batches, which come in
    random order.

    Args:
        step: number of the step.
        batch_size: examples in a batch.
        lengths: number of tokens of each example.
        seed: seed of the shuffles.
    """
    # A window is sorted as a whole; sorting everything would fix the order of all epochs.
    window, place = divmod(step, _BATCHES_SORTED)
    window_size = _BATCHES_SORTED * batch_size
    rows = shuffled_rows(window * window_size, window_size, len(lengths), seed)
    rows.sort(key=lambda row: lengths[row])
    # In random order, or every window would go from short texts to long ones.
    batch = int(np.random.default_rng((seed, window)).permutation(_BATCHES_SORTED)[place])
    return rows[batch * batch_size : (batch + 1) * batch_size]


@lru_cache(maxsize=4)
def _order(total: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of one epoch; cached, because it is asked for once per example."""
    return np.random.default_rng((seed, epoch)).permutation(total)
