"""Split positions into pieces, so that only the logits of one piece are in memory."""

from itertools import pairwise

LOGITS_AT_ONCE = 1 << 24
"""Largest number of logits of one model in memory: 64 MiB in fp32.

That is 341 positions with a vocabulary of 49,152 tokens.
"""
LOGITS_ON_GPU = 1 << 26
"""Largest number of logits of one model in a training step on a GPU: 256 MiB in fp32.

Reading and writing a smaller piece takes less time than starting its kernels.
"""


def logit_pieces(positions: int, vocabulary: int) -> int:
    """Return the number of pieces so that each has about `LOGITS_AT_ONCE` logits at most."""
    return _pieces(positions, vocabulary, LOGITS_AT_ONCE)


def step_pieces(positions: int, vocabulary: int, device_type: str) -> int:
    """Return the number of pieces of a training step, larger ones on a GPU.

    Args:
        positions: number of positions.
        vocabulary: number of logits at each position.
        device_type: type of the device that computes the logits, such as `cuda`.
    """
    at_once = LOGITS_AT_ONCE if device_type == "cpu" else LOGITS_ON_GPU
    return _pieces(positions, vocabulary, at_once)


def _pieces(positions: int, vocabulary: int, at_once: int) -> int:
    # Round up. A piece then exceeds the limit by less than the logits of one position.
    return -(-positions * vocabulary // at_once)


def split_positions(positions: int, pieces: int) -> list[slice]:
    """Return slices of about equal length; some are empty if there are more pieces than positions.

    Ranks that share a sharded head need equal numbers of pieces, even if one has few positions.
    """
    cuts = [positions * piece // pieces for piece in range(pieces + 1)]
    return [slice(first, end) for first, end in pairwise(cuts)]
