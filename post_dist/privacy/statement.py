"""`privacy.json`: the privacy claim of a prompt, the numbers behind it, and what it excludes."""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from post_dist.errors import ArtifactRefused
from post_dist.privacy.accounting import account, composed_epsilon, rdp_epsilon
from post_dist.privacy.ledger import Spending
from post_dist.privacy.plan import RELATION, UNIT, PrivacyPlan

_NOT_COVERED = [
    "the choice of template, label words, prompt length and other settings, where it was made by "
    "looking at the private data",
    "the scores of `post-dist evaluate` on the private data",
    "other prompts from the same data: `post-dist budget` adds them up",
    "several examples of one person: the unit is one example, after repeated texts were dropped",
    "the time that the run took, for anyone who can watch the machine",
]
_SEEDED = "everything: the noise came from a seed and can be subtracted"

# Two machines agree on epsilon more closely than this.
_TOLERANCE = 1e-3

# Numbers outside these bounds give no useful guarantee, or take hours to compute.
_LEAST_NOISE = 0.2
_MOST_NOISE = 1e4
_MOST_STEPS = 10**6
_MOST_TIMES = 100
_LEAST_TRIALS = 1.001
_MOST_TRIALS = 10**4
_MOST_EPSILON = 200.0
_LEAST_PROBABILITY = 1e-300


def privacy_statement(spending: Spending) -> dict[str, Any]:
    """Return the contents of `privacy.json` for a finished run.

    Repeated steps raise epsilon.
    """
    plan = spending.plan
    cost = account(plan)
    # Repeated steps cost more than the plan, so epsilon is computed from what was spent.
    epsilon = cost.epsilon
    if spending.repeated_steps:
        epsilon = composed_epsilon(spending.plans(), plan.delta)
    statement = {
        "private": plan.private,
        "epsilon": epsilon,
        **asdict(plan),
        "steps_repeated": {str(times): count for times, count in spending.repeated_steps.items()},
        "unit": UNIT,
        "neighbouring_relation": RELATION,
        "sampling": plan.sampler.name,
        "accountant": cost.accountant,
        "cross_checks": cost.cross_checks,
        "epsilon_at_delta": cost.epsilon_at,
        "true_positive_rate_at_1_percent_false": cost.true_positive_rate,
        "not_covered": _NOT_COVERED,
    }
    # Noise from a seed protects nothing, so the epsilon of the accountants does not apply.
    if not plan.private:
        statement["epsilon"] = None
        statement["epsilon_at_delta"] = {}
        statement["true_positive_rate_at_1_percent_false"] = 1.0
        statement["not_covered"] = [_SEEDED]
    return statement


def statement_problems(statement: dict[str, Any]) -> list[str]:
    """Recompute epsilon from the numbers of a statement, and describe claims that do not hold.

    Args:
        statement: contents of an untrusted `privacy.json`.

    Raises:
        ArtifactRefused: numbers are missing, or no accountant can take them.
    """
    claim, plan, repeated = _parse(statement)
    # A prompt with seeded noise must not claim an epsilon.
    if not plan.private:
        if claim is None:
            return []
        return ["its noise came from a seed, yet it claims an epsilon"]
    if claim is None:
        return ["it claims no epsilon"]
    # Numbers within the bounds may still overflow in an accountant.
    try:
        true = _epsilon_of(plan, repeated)
    except (TypeError, ValueError, OverflowError):
        raise _not_computable() from None
    if true > _MOST_EPSILON:
        return [f"its numbers give an epsilon above {_MOST_EPSILON:g}, which promises nothing"]
    # A claim above the computed epsilon is allowed, because it promises less.
    if true > claim + _TOLERANCE:
        return [f"it claims epsilon {claim:.4f}, but its numbers give {true:.4f}"]
    return []


def _parse(statement: dict[str, Any]) -> tuple[float | None, PrivacyPlan, dict[int, int]]:
    """Read the claimed epsilon, the plan and the repeated steps of an untrusted statement.

    Raises:
        ArtifactRefused: numbers are missing or out of bounds.
    """
    # The file comes from the other party: any field may be missing or of any type.
    try:
        claim = statement["epsilon"]
        plan = PrivacyPlan(**{field.name: statement[field.name] for field in fields(PrivacyPlan)})
        repeated = {int(times): count for times, count in statement["steps_repeated"].items()}
        usable = _can_be_computed(plan, repeated)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise _not_computable() from None
    if not usable or not (claim is None or _is_between(claim, 0, math.inf)):
        raise _not_computable()
    return claim, plan, repeated


def _not_computable() -> ArtifactRefused:
    return ArtifactRefused("privacy.json lacks the numbers that its epsilon is computed from")


def _epsilon_of(plan: PrivacyPlan, repeated: Mapping[int, int]) -> float:
    """Compute the epsilon of a plan with repeated steps. It is infinite above `_MOST_EPSILON`."""
    begun = {1: plan.steps - sum(repeated.values()), **repeated}
    plans = plan.spent(begun)
    # RDP is fast for any numbers, so it first rejects claims that promise nothing.
    if rdp_epsilon(plans, plan.delta) > _MOST_EPSILON:
        return math.inf
    return composed_epsilon(plans, plan.delta)


def _can_be_computed(plan: PrivacyPlan, repeated: Mapping[int, int]) -> bool:
    """Return whether an accountant can take untrusted numbers in reasonable time."""
    counts = (plan.steps, *repeated.values())
    if not all(type(count) is int and 1 <= count <= _MOST_STEPS for count in counts):
        return False
    if not all(1 < times <= _MOST_TIMES for times in repeated):
        return False
    # A single run cannot repeat more steps than the plan has. A search has several runs.
    if plan.mean_trials is None and sum(repeated.values()) > plan.steps:
        return False
    # Zero is not allowed, because accountants take the logarithm.
    probabilities = (plan.sampling_probability, plan.delta)
    if not all(_is_between(value, _LEAST_PROBABILITY, 1) for value in probabilities):
        return False
    if not _is_between(plan.noise_multiplier, _LEAST_NOISE, _MOST_NOISE):
        return False
    # A search gives both of these numbers, and a single run gives neither.
    if plan.mean_trials is None and plan.score_noise_multiplier is None:
        return True
    return _is_between(plan.mean_trials, _LEAST_TRIALS, _MOST_TRIALS) and _is_between(
        plan.score_noise_multiplier, _LEAST_NOISE, _MOST_NOISE
    )


def _is_between(number: object, least: float, most: float) -> bool:
    """Return whether an untrusted value is a number between two bounds.

    True and False do not count as numbers.
    """
    return type(number) in (int, float) and least <= number <= most  # type: ignore[operator]
