"""Find the least noise with which a plan meets its target epsilon, within a tolerance."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

from post_dist.config.schema import RunConfig
from post_dist.errors import InputError
from post_dist.privacy.accounting import COARSE, FINE, epsilon_of
from post_dist.privacy.plan import PrivacyPlan, declared_plan

# A calibrated sigma is a multiple of this.
_SIGMA_GRID = 1e-4
LEAST_SIGMA = 0.2
"""Smallest noise multiplier that a calibration gives."""
_MOST_SIGMA = 200.0

# The search starts at sigma 1 and raises it by this factor, because the privacy loss of a small
# sigma takes longest to compute.
_RAISE = 1.6

# A published epsilon that is less than this share below its target needs no further search.
_SHORTFALL = 2e-3


def private_plan(config: RunConfig) -> PrivacyPlan:
    """Return the plan of a run file, with calibrated noise where the file gives a target epsilon.

    Raises:
        InputError: the section `privacy` lacks a number, or no noise multiplier in range meets the
            target.
    """
    section = config.privacy
    if section.noise_multiplier is not None:
        return declared_plan(config, section.noise_multiplier)
    plan = declared_plan(config, noise_multiplier=1.0)
    if section.target_epsilon is None:
        raise InputError(
            "privacy: give target_epsilon or noise_multiplier",
            "for example --set privacy.target_epsilon=8",
        )
    return calibrated(plan, section.target_epsilon)


def private_plans(config: RunConfig) -> list[PrivacyPlan]:
    """Return all plans of a pipeline: its own, and those of its `evaluate.private_rows`.

    Raises:
        InputError: see `private_plan`.
    """
    plans = []
    for section in config.all_privacy:
        if section.enabled:
            plans.append(private_plan(config.model_copy(update={"privacy": section})))
    return plans


@cache
def calibrated(plan: PrivacyPlan, target: float) -> PrivacyPlan:
    """Return the plan with the least noise that meets a target epsilon.

    The published epsilon of the result is at most the target, and at least 99.8% of it. Where one
    multiple of the grid changes epsilon by more than that, the result is the smallest multiple.

    Raises:
        InputError: no sigma in range meets the target.
    """

    def with_noise(multiples: int) -> PrivacyPlan:
        return replace(plan, noise_multiplier=round(multiples * _SIGMA_GRID, 4))

    def meets(multiples: int, interval: float | None) -> bool:
        return epsilon_of(with_noise(multiples), interval) <= target

    most = round(_MOST_SIGMA / _SIGMA_GRID)
    # If the largest sigma does not meet the target, no sigma in range does.
    if not meets(most, None):
        raise InputError(
            f"privacy.target_epsilon: no noise multiplier up to {_MOST_SIGMA:g} reaches {target:g}",
            "set fewer steps, a smaller sampling_probability, more noise on scores and comparisons "
            "or a larger target_epsilon",
        )
    found = round(1 / _SIGMA_GRID)
    while found < most and not meets(found, COARSE):
        found = min(most, round(_RAISE * found))
    # The coarse interval is pessimistic, most so for many steps that reveal little each. A finer
    # one takes longer, so it starts from what the coarser one has found.
    found = _lowered(partial(meets, interval=COARSE), found, found // 5, width=1)
    for interval in (FINE, None):
        if epsilon_of(with_noise(found)) >= (1 - _SHORTFALL) * target:
            break
        found = _lowered(partial(meets, interval=interval), found, found // 100, found // 4000)
    if found <= round(LEAST_SIGMA / _SIGMA_GRID):
        raise InputError(
            f"privacy.target_epsilon: {target:g} is met with a noise multiplier "
            f"below {LEAST_SIGMA:g}",
            "set a smaller target_epsilon, or set noise_multiplier",
        )
    # Numbers of different intervals are equal up to rounding errors only.
    while epsilon_of(with_noise(found)) > target:
        found += 1
    return with_noise(found)


def _lowered(meets: Callable[[int], bool], high: int, step: int, width: int) -> int:
    """Lower a sigma that meets the target, as far as it still does.

    Args:
        meets: whether a multiple of the grid meets the target.
        high: a multiple that does.
        step: the first step down. Later ones are twice as large each.
        width: the result is at most so many multiples above the smallest that meets the target.
    """
    least = round(LEAST_SIGMA / _SIGMA_GRID)
    low = max(least, high - step)
    while meets(low):
        if low == least:
            return least
        high = low
        step *= 2
        low = max(least, low - step)
    while high - low > max(1, width):
        middle = (low + high) // 2
        if meets(middle):
            high = middle
        else:
            low = middle
    return high
