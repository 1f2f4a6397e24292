"""Find the smallest noise multiplier with which a plan meets its target epsilon."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

from dp_accounting import DpEvent, PrivacyAccountant, rdp
from dp_accounting.mechanism_calibration import ExplicitBracketInterval, calibrate_dp_mechanism
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

from post_dist.config.schema import RunConfig
from post_dist.errors import InputError
from post_dist.privacy.accounting import COARSE, FINE, epsilon_of
from post_dist.privacy.plan import PrivacyPlan, declared_plan

# A calibrated sigma is rounded up to a multiple of this.
_SIGMA_GRID = 1e-4
LEAST_SIGMA = 0.2
"""Smallest noise multiplier that a calibration gives."""
_MOST_SIGMA = 200.0

# Step of the bracket search, in log sigma. The search starts at sigma 1, because the privacy loss
# of a small sigma takes longest to compute.
_BRACKET_STEP = 0.5


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
    """Return the plan with the smallest sigma on the grid that meets a target epsilon.

    Raises:
        InputError: no sigma in range meets the target.
    """
    accountant: Callable[[], PrivacyAccountant] = rdp.RdpAccountant
    if plan.mean_trials is None:
        accountant = partial(PLDAccountant, value_discretization_interval=COARSE)

    def with_noise(log_sigma: float) -> PrivacyPlan:
        return replace(plan, noise_multiplier=math.exp(log_sigma))

    def event(log_sigma: float) -> DpEvent:
        return with_noise(log_sigma).event()

    def excess(log_sigma: float) -> float:
        return epsilon_of(with_noise(log_sigma), COARSE) - target

    # The library finds the root in log sigma and returns a point on the safe side of it.
    bracket = _bracket(excess, target)
    log_sigma = calibrate_dp_mechanism(accountant, event, target, plan.delta, bracket, tol=1e-6)
    # Rounded up, so that the noise is never less than needed.
    multiples = math.ceil(math.exp(log_sigma) / _SIGMA_GRID)
    # The coarse loss is the more pessimistic one, so the first multiple meets the target as a rule.
    while True:
        rounded = replace(plan, noise_multiplier=round(multiples * _SIGMA_GRID, 4))
        if epsilon_of(rounded, FINE) <= target:
            return rounded
        multiples += 1


def _bracket(excess: Callable[[float], float], target: float) -> ExplicitBracketInterval:
    """Find an interval of log sigma in which epsilon crosses the target.

    dp-accounting's own bracket search starts at the smallest sigma. It makes calibration 1.7 to 3
    times as slow.

    Args:
        excess: epsilon minus the target, as a decreasing function of log sigma.
        target: the target epsilon, for messages.

    Raises:
        InputError: epsilon crosses the target outside the range of sigma.
    """
    # If the largest sigma does not meet the target, no sigma in range does.
    least = math.log(LEAST_SIGMA)
    most = math.log(_MOST_SIGMA)
    if excess(most) > 0:
        raise InputError(
            f"privacy.target_epsilon: no noise multiplier up to {_MOST_SIGMA:g} reaches {target:g}",
            "set fewer steps, a smaller sampling_probability, more noise on scores and comparisons "
            "or a larger target_epsilon",
        )
    # Raise sigma from 1 until the target is met.
    high = 0.0
    while excess(high) > 0:
        high = min(most, high + _BRACKET_STEP)
    # Lower sigma from there until the target is no longer met.
    low = max(least, high - _BRACKET_STEP)
    while excess(low) <= 0:
        if low == least:
            raise InputError(
                f"privacy.target_epsilon: {target:g} is met with a noise multiplier "
                f"below {LEAST_SIGMA:g}",
                "set a smaller target_epsilon, or set noise_multiplier",
            )
        high = low
        low = max(least, low - _BRACKET_STEP)
    return ExplicitBracketInterval(low, high)
