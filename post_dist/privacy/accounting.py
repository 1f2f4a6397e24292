"""Compute the epsilon of a plan, and of several runs on the same data.

The published epsilon comes from the privacy loss distribution (PLD) of dp-accounting, which is
pessimistic ("connect the dots"). The RDP accountant of the same library and the PRV accountant of
Opacus are cross-checks and must agree with it. A search is a repeat-and-select event (arXiv
2110.03620). Only RDP can compose it, so the published epsilon of a search is that of RDP. The three
accountants are then compared on a single trial.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np
from absl import logging as absl_logging
from dp_accounting import PrivacyAccountant, rdp
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

from post_dist.errors import PrivacyRefused
from post_dist.privacy.plan import PrivacyPlan

# dp-accounting warns about each RDP order that it drops. Dropped orders only raise the bound.
absl_logging.set_verbosity(absl_logging.ERROR)

FINE = 1e-4
"""Discretization interval of the privacy loss for published epsilons.

A fifth of it is taken where one step reveals so little that the interval would raise epsilon.
"""

COARSE = 1e-3
"""Discretization interval for the first search for sigma, and for many different plans.

It is fast, and it raises epsilon most where many steps reveal little each.
"""

# Each step's loss is rounded up and down to a multiple of the interval. The noise of this rounding
# adds up over the steps. At a fifth of the loss of a step, it raises epsilon by less than 0.4%.
_INTERVALS_IN_A_LOSS = 5

# With less noise, rare large losses decide. A fifth of `FINE` changes epsilon by less than 0.01
# there, and takes up to ten times as long.
_LEAST_NOISE_FOR_FINEST = 0.5

# So many different plans are composed at the fine interval, whatever their losses.
_FEW_PLANS = 3

# PLD may exceed the upper end of PRV by twice PRV's own error in epsilon.
PRV_ABOVE = 0.02

# PLD may fall short of the upper end of PRV by five times PRV's error. The largest gap measured
# was 0.013.
_PRV_BELOW = 0.05
FALSE_POSITIVE_RATE = 0.01

# Sizes of the groups of examples for which epsilon is stated, and the largest one worth stating.
_GROUP_SIZES = (2, 4, 8)
MOST_GROUP_EPSILON = 200.0


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


@cache
def account(plan: PrivacyPlan) -> Account:
    """Compute the privacy cost of a plan with three accountants.

    Raises:
        PrivacyRefused: the accountants disagree.
    """
    # PLD and PRV do not support repeat-and-select, so the accountants are compared on one trial.
    trial = replace(plan, mean_trials=None)
    accountant = _pld((trial,), _interval([trial]))
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
        interval = _interval(plans)
        name = pld_name(interval)
        accountant = pld = _pld(plans, interval)
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


def pld_name(interval: float) -> str:
    """Return the accountant's name in a statement."""
    # Finished statements have this name, so it keeps its British spelling.
    return f"PLD (dp-accounting, discretisation {interval:g})"


def group_epsilons(plans: Sequence[PrivacyPlan], delta: float) -> dict[str, float | None]:
    """Compute epsilon for groups of units, such as several examples of one person.

    A mechanism that is (e, d)-private for one unit is private for k units with epsilon k e and
    delta d (exp(k e) - 1) / (exp(e) - 1) (Vadhan 2017, proof of lemma 2.2). The best pair (e, d) of
    the mechanism is taken.

    Args:
        plans: see `cost_of`.
        delta: the delta at which to state epsilon.

    Returns:
        Epsilon by the size of the group; None above `MOST_GROUP_EPSILON`.
    """
    return dict(_group_epsilons(tuple(plans), delta))


@lru_cache(maxsize=8)
def _group_epsilons(plans: tuple[PrivacyPlan, ...], delta: float) -> dict[str, float | None]:
    """Compute the epsilons of groups once. The result is cached: do not change it."""
    accountant = _composed(plans)
    return {str(size): _group_epsilon(accountant, size, delta) for size in _GROUP_SIZES}


def _group_epsilon(accountant: PrivacyAccountant, size: int, delta: float) -> float | None:
    """Return epsilon for a group of units; None above `MOST_GROUP_EPSILON`."""

    def holds(epsilon: float) -> bool:
        grown = math.expm1(size * epsilon) / math.expm1(epsilon)
        return float(accountant.get_delta(epsilon)) * grown <= delta

    # The first of some epsilons that is large enough, and then the least one before it.
    low = 0.0
    for high in np.linspace(0, MOST_GROUP_EPSILON / size, 41)[1:].tolist():
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
    return _epsilon(tuple(plans), delta)


def rdp_epsilon(plans: Sequence[PrivacyPlan], delta: float) -> float:
    """Return an upper bound on the epsilon of several runs, by RDP. It is fast for any plan."""
    return float(_rdp(tuple(plans)).get_epsilon(delta))


def _check_agreement(checks: dict[str, float]) -> None:
    """Compare the epsilons of the three accountants.

    Raises:
        PrivacyRefused: PLD is too far from PRV, or RDP is below it.
    """
    pld = checks["pld"]
    prv = checks["prv"]
    # PRV is an estimate with a known error. PLD and RDP are upper bounds, and either may be the
    # tighter one: PLD is rounded up.
    near_prv = prv - _PRV_BELOW <= pld <= prv + PRV_ABOVE
    if checks["rdp"] < prv - _PRV_BELOW or not near_prv:
        raise PrivacyRefused(
            f"the accountants disagree on epsilon: {checks}", "report this plan as a bug"
        )


def _epsilon_at(accountant: PrivacyAccountant, plan: PrivacyPlan) -> dict[str, float]:
    """Return epsilon at deltas that are stricter than the plan's."""
    deltas = {"1e-06": 1e-6}
    if plan.declared_examples is not None:
        deltas["1 / (100 declared_examples)"] = 1 / (100 * plan.declared_examples)
    return {name: float(accountant.get_epsilon(delta)) for name, delta in deltas.items()}


@lru_cache(maxsize=8)
def _epsilon(plans: tuple[PrivacyPlan, ...], delta: float) -> float:
    """Return the epsilon of several private runs. A budget of one run asks for it twice."""
    return float(_composed(plans).get_epsilon(delta))


def _composed(plans: Sequence[PrivacyPlan]) -> PrivacyAccountant:
    """Compose runs by the accountant of their published epsilon. Do not change the result."""
    # Only RDP composes searches.
    if any(plan.mean_trials is not None for plan in plans):
        return _rdp(tuple(plans))
    # A ledger may hold many different plans, and each takes half a second at the fine interval.
    many = len(set(plans)) > _FEW_PLANS
    fits = _least_loss(plans) >= _INTERVALS_IN_A_LOSS * COARSE
    return _pld(tuple(plans), COARSE if many and fits else _interval(plans))


def _interval(plans: Sequence[PrivacyPlan]) -> float:
    """Return the discretization interval for the published epsilon of runs."""
    return FINE if _least_loss(plans) >= _INTERVALS_IN_A_LOSS * FINE else FINE / 5


def _least_loss(plans: Sequence[PrivacyPlan]) -> float:
    """Return the least of the plans' losses of a step, each as a root mean square.

    That of Poisson sampling is q (exp(1 / sigma^2) - 1)^(1/2) to first order in q. It is infinite
    here for a sigma so small that a finer interval is not worth its time.
    """
    if min(plan.noise_multiplier for plan in plans) < _LEAST_NOISE_FOR_FINEST:
        return math.inf
    return min(
        plan.sampling_probability * math.sqrt(math.expm1(plan.noise_multiplier**-2))
        for plan in plans
    )


@lru_cache(maxsize=4)
def _pld(plans: tuple[PrivacyPlan, ...], interval: float) -> PLDAccountant:
    """Compose runs by their privacy loss distributions. The result is cached: do not change it."""
    accountant = PLDAccountant(value_discretization_interval=interval)
    # A loss distribution takes seconds to compute, so equal plans share one.
    for plan, count in Counter(plans).items():
        accountant.compose(plan.event(), count)
    return accountant


def epsilon_of(plan: PrivacyPlan, interval: float | None = None) -> float:
    """Return the epsilon of one run at its own delta.

    RDP composes a search and ignores the discretization interval.

    Args:
        plan: the plan of the run.
        interval: the discretization interval. None takes that of the published epsilon.
    """
    if plan.mean_trials is not None:
        return rdp_epsilon([plan], plan.delta)
    return float(_pld((plan,), interval or _interval([plan])).get_epsilon(plan.delta))


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
        # Opacus takes logarithms of zero, but does not use the results. It also begins with a bound
        # of another accountant, and says where that is loose.
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", UserWarning)
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
        # A larger epsilon bounds nothing, and overflows.
        by_members = math.exp(min(epsilon, 100.0)) * false_positive_rate + delta
        by_others = 1 - math.exp(-epsilon) * (1 - delta - false_positive_rate)
        bound = min(bound, by_members, by_others)
    return bound
