"""Compute the epsilon of a plan, and the smallest noise multiplier for a target epsilon.

The published epsilon comes from the privacy loss distribution (PLD) of dp-accounting, which is
pessimistic ("connect the dots"). The RDP accountant of the same library and the PRV accountant of
Opacus are cross-checks and must agree with it. A search is a repeat-and-select event (arXiv
2110.03620). Only RDP can compose it, so the published epsilon of a search is that of RDP. The three
accountants are then compared on a single trial.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np
from absl import logging as absl_logging
from dp_accounting import DpEvent, PrivacyAccountant, rdp
from dp_accounting.mechanism_calibration import ExplicitBracketInterval, calibrate_dp_mechanism
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

from post_dist.config.schema import RunConfig
from post_dist.errors import InputError, PrivacyRefused
from post_dist.privacy.plan import PrivacyPlan, declared_plan

# dp-accounting warns about each RDP order that it drops. Dropped orders only raise the bound.
absl_logging.set_verbosity(absl_logging.ERROR)

# Discretization interval of the privacy loss for published epsilons.
_FINE = 1e-4

# Discretization interval during the search for sigma. It raises epsilon by at most 6e-4 over
# `_FINE`.
_COARSE = 1e-3

# Discretization interval for many different plans. With 60 of them it gives 12.53 for 12.18.
_COARSEST = 5e-3
_FEW_PLANS = 3

# A calibrated sigma is rounded up to a multiple of this.
_SIGMA_GRID = 1e-4
_LEAST_SIGMA = 0.2
_MOST_SIGMA = 200.0

# Step of the bracket search, in log sigma. The search starts at sigma 1, because the privacy loss
# of a small sigma takes longest to compute.
_BRACKET_STEP = 0.5

# PLD may exceed the upper end of PRV by twice PRV's own error in epsilon.
PRV_ABOVE = 0.02

# PLD may fall short of the upper end of PRV by five times PRV's error. The largest gap measured
# was 0.013.
_PRV_BELOW = 0.05
FALSE_POSITIVE_RATE = 0.01

# Sizes of the groups of examples for which epsilon is stated, and the largest one worth stating.
_GROUP_SIZES = (2, 4, 8)
_MOST_GROUP_EPSILON = 200.0


@dataclass(frozen=True)
class Cost:
    """What one run, or several on the same data, reveal at most.

    Attributes:
        epsilon: the published epsilon, at the plan's delta.
        accountant: name of the accountant that computed `epsilon`.
        epsilon_at: epsilon at stricter deltas, by the name of the delta.
        true_positive_rate: upper bound for any attack at a false positive rate of 1%.
    """

    epsilon: float
    accountant: str
    epsilon_at: dict[str, float]
    true_positive_rate: float


@dataclass(frozen=True)
class Account(Cost):
    """Privacy cost of a plan, on which three accountants agree.

    Attributes:
        cross_checks: epsilon by `rdp` and `prv`. For a search these are epsilons of one trial, and
            `pld` is included.
    """

    cross_checks: dict[str, float]


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
    return _calibrated(plan, section.target_epsilon)


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
def account(plan: PrivacyPlan) -> Account:
    """Compute the privacy cost of a plan with three accountants.

    Raises:
        PrivacyRefused: the accountants disagree.
    """
    # PLD and PRV do not support repeat-and-select, so the accountants are compared on one trial.
    trial = replace(plan, mean_trials=None)
    accountant = _pld((trial,), _FINE)
    checks = {
        "pld": float(accountant.get_epsilon(plan.delta)),
        "rdp": rdp_epsilon([trial], plan.delta),
        "prv": _prv_epsilon(trial),
    }
    _check_agreement(checks)
    # The published epsilon of a single run is that of PLD, so it is no cross-check.
    if plan.mean_trials is None:
        checks.pop("pld")
    return Account(**vars(cost_of([plan], plan)), cross_checks=checks)


def cost_of(plans: Sequence[PrivacyPlan], stated_for: PrivacyPlan) -> Cost:
    """Compute what runs on the same data reveal together.

    Args:
        plans: one private plan for each run, or for each part of what a run has spent.
        stated_for: the plan whose delta and declared examples the numbers refer to.
    """
    return _cost_of(tuple(plans), stated_for)


@lru_cache(maxsize=8)
def _cost_of(plans: tuple[PrivacyPlan, ...], stated_for: PrivacyPlan) -> Cost:
    """Compute a cost once: a statement is written, and then read back with its checks."""
    accountant: PrivacyAccountant
    # Only RDP composes searches.
    if any(plan.mean_trials is not None for plan in plans):
        name = "RDP of repeat-and-select (dp-accounting)"
        accountant = _rdp(plans)
        # Each delta gives one point of the privacy profile.
        deltas = [float(delta) for delta in np.logspace(-12, -1, 45)]
        profile = [(float(accountant.get_epsilon(delta)), delta) for delta in deltas]
    else:
        name = f"PLD (dp-accounting, discretisation {_FINE:g})"
        accountant = pld = _pld(plans, _FINE)
        epsilons = np.linspace(0, 20, 401)
        # One call for all of them: a call for each takes 14 s.
        # pyrefly: ignore[bad-argument-type]
        reached: Any = pld.get_delta(epsilons)
        profile = list(zip(epsilons.tolist(), reached.tolist(), strict=True))
    # The privacy profile bounds the power of any attack.
    return Cost(
        epsilon=float(accountant.get_epsilon(stated_for.delta)),
        accountant=name,
        epsilon_at=_epsilon_at(accountant, stated_for),
        true_positive_rate=_true_positive_rate(profile),
    )


def group_epsilons(plans: Sequence[PrivacyPlan], delta: float) -> dict[str, float]:
    """Compute epsilon for groups of units, such as several examples of one person.

    A mechanism that is (e, d)-private for one unit is private for k units with epsilon k e and
    delta d (exp(k e) - 1) / (exp(e) - 1) (Vadhan 2017, proof of lemma 2.2). The best pair (e, d) of
    the mechanism is taken.

    Args:
        plans: see `cost_of`.
        delta: the delta at which to state epsilon.

    Returns:
        Epsilon by the size of the group, as far as it is small enough to be worth stating.
    """
    return dict(_group_epsilons(tuple(plans), delta))


@lru_cache(maxsize=8)
def _group_epsilons(plans: tuple[PrivacyPlan, ...], delta: float) -> dict[str, float]:
    """Compute the epsilons of groups once. The result is cached: do not change it."""
    accountant = _composed(plans)
    found = {}
    for size in _GROUP_SIZES:
        epsilon = _group_epsilon(accountant, size, delta)
        if epsilon is not None:
            found[str(size)] = epsilon
    return found


def _group_epsilon(accountant: PrivacyAccountant, size: int, delta: float) -> float | None:
    """Return epsilon for a group of units; None above `_MOST_GROUP_EPSILON`."""

    def holds(epsilon: float) -> bool:
        grown = math.expm1(size * epsilon) / math.expm1(epsilon)
        return float(accountant.get_delta(epsilon)) * grown <= delta

    # The first of some epsilons that is large enough, and then the least one before it.
    low = 0.0
    for high in np.linspace(0, _MOST_GROUP_EPSILON / size, 41)[1:].tolist():
        if holds(high):
            for _ in range(12):
                middle = (low + high) / 2
                if holds(middle):
                    high = middle
                else:
                    low = middle
            return float(size * high)
        low = high
    return None


def composed_epsilon(plans: Sequence[PrivacyPlan], delta: float) -> float:
    """Return the epsilon of several runs on the same data.

    It is infinite if the noise of any run is repeatable.

    Args:
        plans: one plan for each run.
        delta: the delta at which to state epsilon.
    """
    if not plans:
        return 0.0
    # Repeatable noise can be subtracted, which voids the guarantee of all runs.
    if any(not plan.private for plan in plans):
        return math.inf
    return float(_composed(plans).get_epsilon(delta))


def rdp_epsilon(plans: Sequence[PrivacyPlan], delta: float) -> float:
    """Return an upper bound on the epsilon of several runs, by RDP. It is fast for any plan."""
    return float(_rdp(tuple(plans)).get_epsilon(delta))


@cache
def _calibrated(plan: PrivacyPlan, target: float) -> PrivacyPlan:
    """Return the plan with the smallest sigma on the grid that meets a target epsilon."""
    accountant: Callable[[], PrivacyAccountant] = rdp.RdpAccountant
    if plan.mean_trials is None:
        accountant = partial(PLDAccountant, value_discretization_interval=_COARSE)

    def with_noise(log_sigma: float) -> PrivacyPlan:
        return replace(plan, noise_multiplier=math.exp(log_sigma))

    def event(log_sigma: float) -> DpEvent:
        return with_noise(log_sigma).event()

    def excess(log_sigma: float) -> float:
        return _epsilon(with_noise(log_sigma), _COARSE) - target

    # The library finds the root in log sigma and returns a point on the safe side of it.
    bracket = _bracket(excess, target)
    log_sigma = calibrate_dp_mechanism(accountant, event, target, plan.delta, bracket, tol=1e-6)
    # Rounded up, so that the noise is never less than needed.
    multiples = math.ceil(math.exp(log_sigma) / _SIGMA_GRID)
    # The coarse loss is the more pessimistic one, so the first multiple meets the target as a rule.
    while True:
        rounded = replace(plan, noise_multiplier=round(multiples * _SIGMA_GRID, 4))
        if _epsilon(rounded, _FINE) <= target:
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
    least = math.log(_LEAST_SIGMA)
    most = math.log(_MOST_SIGMA)
    if excess(most) > 0:
        raise InputError(
            f"privacy.target_epsilon: no noise multiplier up to {_MOST_SIGMA:g} reaches {target:g}",
            "set fewer steps, a smaller sampling_probability or a larger target_epsilon",
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
                f"below {_LEAST_SIGMA:g}",
                "set a smaller target_epsilon, or set noise_multiplier",
            )
        high = low
        low = max(least, low - _BRACKET_STEP)
    return ExplicitBracketInterval(low, high)


def _check_agreement(checks: dict[str, float]) -> None:
    """Compare the epsilons of the three accountants.

    Raises:
        PrivacyRefused: PLD exceeds RDP, or is too far from PRV.
    """
    pld = checks["pld"]
    prv = checks["prv"]
    # RDP is an upper bound. PRV is an estimate with a known error.
    near_prv = prv - _PRV_BELOW <= pld <= prv + PRV_ABOVE
    if pld > checks["rdp"] or not near_prv:
        raise PrivacyRefused(
            f"the accountants disagree on epsilon: {checks}", "report this plan as a bug"
        )


def _epsilon_at(accountant: PrivacyAccountant, plan: PrivacyPlan) -> dict[str, float]:
    """Return epsilon at deltas that are stricter than the plan's."""
    deltas = {"1e-06": 1e-6}
    if plan.declared_examples is not None:
        deltas["1 / (100 declared_examples)"] = 1 / (100 * plan.declared_examples)
    return {name: float(accountant.get_epsilon(delta)) for name, delta in deltas.items()}


def _composed(plans: Sequence[PrivacyPlan]) -> PrivacyAccountant:
    """Compose runs by the accountant of their published epsilon. Do not change the result."""
    # Only RDP composes searches.
    if any(plan.mean_trials is not None for plan in plans):
        return _rdp(tuple(plans))
    # A ledger may hold many different plans, and each takes half a second at the fine interval. A
    # coarser interval only raises epsilon.
    different = len(set(plans))
    interval = _FINE if different <= _FEW_PLANS else min(_COARSEST, _COARSE * different / 10)
    return _pld(tuple(plans), interval)


@lru_cache(maxsize=4)
def _pld(plans: tuple[PrivacyPlan, ...], interval: float) -> PLDAccountant:
    """Compose runs by their privacy loss distributions. The result is cached: do not change it."""
    accountant = PLDAccountant(value_discretization_interval=interval)
    # A loss distribution takes seconds to compute, so equal plans share one.
    for plan, count in Counter(plans).items():
        accountant.compose(plan.event(), count)
    return accountant


def _epsilon(plan: PrivacyPlan, interval: float) -> float:
    """Return the epsilon of one run at its own delta.

    RDP composes a search and ignores the discretization interval.
    """
    if plan.mean_trials is not None:
        return rdp_epsilon([plan], plan.delta)
    return float(_pld((plan,), interval).get_epsilon(plan.delta))


@lru_cache(maxsize=8)
def _rdp(plans: tuple[PrivacyPlan, ...]) -> rdp.RdpAccountant:
    """Compose runs, searches included, by Renyi differential privacy. Do not change the result."""
    accountant = rdp.RdpAccountant()
    for plan in plans:
        accountant.compose(plan.event())
    return accountant


def _prv_epsilon(trial: PrivacyPlan) -> float:
    """Return the upper end of the PRV accountant's estimate for one trial."""
    from opacus.accountants import PRVAccountant  # imports torch

    accountant = PRVAccountant()
    # Opacus takes its history as (sigma, q, steps). A score is one step over all examples.
    accountant.history = trial.sampler.opacus_history(trial.noise_multiplier, trial.steps)
    if trial.score_noise_multiplier is not None:
        accountant.history.append((trial.score_noise_multiplier, 1.0, 1))
    with warnings.catch_warnings():
        # Opacus takes logarithms of zero, but does not use the results.
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(accountant.get_epsilon(trial.delta))


def _true_positive_rate(profile: Iterable[tuple[float, float]]) -> float:
    """Bound the true positive rate of any attack at a false positive rate of 1%.

    Source: Kairouz et al. 2015.

    Args:
        profile: pairs (epsilon, delta) for which the mechanism is differentially private.
    """
    false_positive_rate = FALSE_POSITIVE_RATE
    bound = 1.0
    # Each (epsilon, delta) bounds both error rates of a test; the tightest pair counts.
    for epsilon, delta in profile:
        by_members = math.exp(epsilon) * false_positive_rate + delta
        by_others = 1 - math.exp(-epsilon) * (1 - delta - false_positive_rate)
        bound = min(bound, by_members, by_others)
    return bound
