"""Epsilon of a plan, and the least noise for an epsilon.

The figure of record is the privacy loss distribution of dp-accounting (pessimistic: "connect the dots"); RDP of the same
library and Opacus' PRV are computed beside it and must agree. A search is a repeat-and-select event (arXiv 2110.03620),
which only RDP can compose, so its figure is RDP's, and the three accountants are compared on one of its trials.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import numpy as np
from absl import logging as absl_logging
from dp_accounting import rdp
from dp_accounting.pld.privacy_loss_distribution import (
    PrivacyLossDistribution,
    from_gaussian_mechanism,
)
from scipy.optimize import brentq

from post_dist.config.schema import RunConfig
from post_dist.errors import InputError, PrivacyRefused
from post_dist.privacy.plan import PrivacyPlan, plan_fields

absl_logging.set_verbosity(
    absl_logging.ERROR
)  # RDP warns of each order that it drops; fewer orders only raise its bound

_FINE, _COARSE = 1e-4, 1e-3
"""Discretisation of the privacy loss: for figures that are stated, and for the search of sigma (within 6e-4 of each other)."""
_SIGMA_GRID = 1e-4
_SIGMA_RANGE = (0.2, 200.0)
_PRV_ABOVE, _PRV_BELOW = 0.02, 0.05
"""PLD may exceed the upper end of PRV by twice PRV's own error in epsilon, and fall short of it by five times that (0.013 was seen)."""
FALSE_POSITIVE_RATE = 0.01


@dataclass(frozen=True)
class Account:
    """What a plan costs.

    Attributes:
        epsilon: the figure of record at the plan's delta.
        accountant: what computed it.
        cross_checks: epsilon by `rdp` and `prv`, and `pld` where the record is another; of one trial in a search.
        epsilon_at: epsilon at stricter deltas, by their names.
        true_positive_rate: the most that any attack gains at a false positive rate of 1%.
    """

    epsilon: float
    accountant: str
    cross_checks: dict[str, float]
    epsilon_at: dict[str, float]
    true_positive_rate: float


def private_plan(config: RunConfig) -> PrivacyPlan:
    """The plan of a run file, with its noise calibrated when the file gives a target epsilon.

    Raises:
        InputError: the section `privacy` does not say enough, or no noise reaches its target.
    """
    fields, section = plan_fields(config), config.privacy
    if section.noise_multiplier is not None:
        return PrivacyPlan(noise_multiplier=section.noise_multiplier, **fields)
    if section.target_epsilon is None:
        raise InputError(
            "privacy: give target_epsilon or noise_multiplier",
            "for example --set privacy.target_epsilon=8",
        )
    return _calibrated(tuple(fields.items()), section.target_epsilon)


def private_plans(config: RunConfig) -> list[PrivacyPlan]:
    """All plans that a pipeline of this run file follows: its own if it is private, and those of its `evaluate.private_rows`.

    Raises:
        InputError: see `private_plan`.
    """
    return [
        private_plan(config.model_copy(update={"privacy": section}))
        for section in config.all_privacy
        if section.enabled
    ]


@cache
def account(plan: PrivacyPlan) -> Account:
    """What a plan costs, by three accountants.

    Raises:
        PrivacyRefused: they disagree.
    """
    trial = replace(plan, mean_trials=None)
    losses = _losses(trial, _FINE)
    checks = {
        "pld": float(losses.get_epsilon_for_delta(plan.delta)),
        "rdp": rdp_epsilon([trial], plan.delta),
        "prv": _prv_epsilon(trial),
    }
    pld, prv = checks["pld"], checks["prv"]
    if pld > checks["rdp"] or not prv - _PRV_BELOW <= pld <= prv + _PRV_ABOVE:
        raise PrivacyRefused(
            f"the accountants disagree on epsilon: {checks}", "report this plan as a bug"
        )
    deltas = {"1e-06": 1e-6}
    if plan.declared_examples is not None:
        deltas["1 / (100 declared_examples)"] = 1 / (100 * plan.declared_examples)
    if plan.mean_trials is None:
        at = {name: float(losses.get_epsilon_for_delta(delta)) for name, delta in deltas.items()}
        epsilons = np.linspace(0, 20, 401)
        rate = _true_positive_rate(
            zip(epsilons, losses.get_delta_for_epsilon(epsilons), strict=True)
        )
        return Account(
            checks.pop("pld"), f"PLD (dp-accounting, discretisation {_FINE:g})", checks, at, rate
        )
    whole = _rdp([plan])
    at = {name: float(whole.get_epsilon(delta)) for name, delta in deltas.items()}
    rate = _true_positive_rate(
        (float(whole.get_epsilon(delta)), float(delta)) for delta in np.logspace(-12, -1, 45)
    )
    epsilon = float(whole.get_epsilon(plan.delta))
    return Account(epsilon, "RDP of repeat-and-select (dp-accounting)", checks, at, rate)


def composed_epsilon(plans: Sequence[PrivacyPlan], delta: float) -> float:
    """Epsilon of several runs on the same data together, at `delta`; infinity when the noise of one could be repeated."""
    if not plans:
        return 0.0
    if any(not plan.private for plan in plans):
        return math.inf
    if any(plan.mean_trials is not None for plan in plans):
        return rdp_epsilon(plans, delta)
    total, *others = (_losses(plan, _FINE) for plan in plans)
    for losses in others:
        total = total.compose(losses)
    return float(total.get_epsilon_for_delta(delta))


def rdp_epsilon(plans: Sequence[PrivacyPlan], delta: float) -> float:
    """The same by RDP: quick whatever the figures are, and never less than the true one."""
    return float(_rdp(plans).get_epsilon(delta))


@cache
def _calibrated(fields: tuple[tuple[str, object], ...], target: float) -> PrivacyPlan:
    """The plan with the noise for a target, rounded up to a multiple of 1e-4 and accounted again."""

    def plan(sigma: float) -> PrivacyPlan:
        return PrivacyPlan(noise_multiplier=sigma, **dict(fields))  # type: ignore[arg-type]

    def excess(log_sigma: float, interval: float = _COARSE) -> float:
        tried = plan(math.exp(log_sigma))
        if tried.mean_trials is not None:
            return rdp_epsilon([tried], tried.delta) - target
        return float(_losses(tried, interval).get_epsilon_for_delta(tried.delta)) - target

    least, most = (math.log(sigma) for sigma in _SIGMA_RANGE)
    if excess(most) > 0:
        raise InputError(
            f"privacy.target_epsilon: no noise multiplier up to {_SIGMA_RANGE[1]:g} reaches {target:g}",
            "take fewer steps",
        )
    high = max(least, min(most, 0.0))
    while excess(high) > 0:
        high = min(most, high + 0.5)
    low = high - 0.5
    while low > least and excess(low) <= 0:
        high, low = low, low - 0.5
    low = max(low, least)
    if excess(low) <= 0:
        raise InputError(
            f"privacy.target_epsilon: {target:g} is met with a noise multiplier below {_SIGMA_RANGE[0]:g}",
            "take a smaller target, or give a noise_multiplier",
        )
    # The coarse loss is the more pessimistic one, so that the fine one agrees at once, as a rule.
    steps = math.ceil(math.exp(float(brentq(excess, low, high, xtol=1e-6))) / _SIGMA_GRID)
    while excess(math.log(steps * _SIGMA_GRID), _FINE) > 0:
        steps += 1
    return plan(round(steps * _SIGMA_GRID, 4))


@lru_cache(maxsize=4)
def _losses(plan: PrivacyPlan, interval: float) -> PrivacyLossDistribution:
    """The privacy loss distribution of one run, and of its score in a search."""
    step = from_gaussian_mechanism(
        plan.noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=plan.sampling_probability,
    )
    run = step.self_compose(plan.steps)
    if plan.score_noise_multiplier is None:
        return run
    return run.compose(
        from_gaussian_mechanism(plan.score_noise_multiplier, value_discretization_interval=interval)
    )


def _rdp(plans: Sequence[PrivacyPlan]) -> rdp.RdpAccountant:
    accountant = rdp.RdpAccountant()
    for plan in plans:
        accountant.compose(plan.event())
    return accountant


def _prv_epsilon(plan: PrivacyPlan) -> float:
    """The upper end of Opacus' estimate."""
    from opacus.accountants import PRVAccountant  # imports torch

    accountant = PRVAccountant()
    accountant.history = [(plan.noise_multiplier, plan.sampling_probability, plan.steps)]
    if plan.score_noise_multiplier is not None:
        accountant.history.append((plan.score_noise_multiplier, 1.0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", RuntimeWarning
        )  # it takes logarithms of zero where their value is not used
        return float(accountant.get_epsilon(plan.delta))


def _true_positive_rate(profile: Iterable[tuple[float, float]]) -> float:
    """The most true positives of any attack at 1% false positives, from pairs of epsilon and delta (Kairouz et al. 2015)."""
    false = FALSE_POSITIVE_RATE
    return float(
        min(
            min(
                1.0, math.exp(epsilon) * false + delta, 1 - math.exp(-epsilon) * (1 - delta - false)
            )
            for epsilon, delta in profile
        )
    )
