"""Poisson sampling: which rows a step reads. The only sampler that the accounting holds for."""

from post_dist.privacy.plan import PrivacyPlan
from post_dist.privacy.randomness import RandomSource

_WORDS = 2**64


def poisson_rows(plan: PrivacyPlan, source: RandomSource, total: int, *step: object) -> list[int]:
    """The rows of a step: each of `total` rows by itself with the plan's sampling probability.

    Args:
        plan: gives q.
        source: of the run.
        total: how many rows there are; private, and not part of any figure.
        step: names the step; the same name draws the same rows.

    Returns:
        Row numbers in rising order; there may be none.
    """
    words_N = source.words(total, "rows", *step)
    threshold = int(plan.sampling_probability * _WORDS)
    return [row for row, word in enumerate(words_N.tolist()) if word < threshold]
