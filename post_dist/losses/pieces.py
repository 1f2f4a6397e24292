"""Cut positions into pieces, so that the logits of only a few are in memory at once."""

from itertools import pairwise

LOGITS_AT_ONCE = 1 << 24
"""Most logits of one model in memory: 64 MiB in fp32, or 341 positions of 49,152 tokens."""


def logit_pieces(positions: int, vocabulary: int) -> int:
    """Return the number of pieces for so many positions, so that few logits are in memory."""
    # Rounded up: the last piece may be smaller, and none is larger than the limit.
    return -(-positions * vocabulary // LOGITS_AT_ONCE)


def split_positions(positions: int, pieces: int) -> list[slice]:
    """Return slices of about equal length; some are empty if there are more pieces than positions.

    Ranks that share a sharded head need equal numbers of pieces, also where one has few positions.
    """
    cuts = [positions * piece // pieces for piece in range(pieces + 1)]
    return [slice(first, end) for first, end in pairwise(cuts)]
