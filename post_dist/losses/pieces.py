"""Split positions into pieces, so that only the logits of one piece are in memory."""

from itertools import pairwise

LOGITS_AT_ONCE = 1 << 24
"""Largest number of logits of one model in memory: 64 MiB in fp32.

That is 341 positions with a vocabulary of 49,152 tokens.
"""


def logit_pieces(positions: int, vocabulary: int) -> int:
    """Return the number of pieces so that each has about `LOGITS_AT_ONCE` logits at most."""
    # Round up. A piece then exceeds the limit by less than the logits of one position.
    return -(-positions * vocabulary // LOGITS_AT_ONCE)


def split_positions(positions: int, pieces: int) -> list[slice]:
    """Return slices of about equal length; some are empty if there are more pieces than positions.

    Ranks that share a sharded head need equal numbers of pieces, even if one has few positions.
    """
    cuts = [positions * piece // pieces for piece in range(pieces + 1)]
    return [slice(first, end) for first, end in pairwise(cuts)]
