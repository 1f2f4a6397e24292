"""`privacy.json`: what a prompt claims, in figures from which the claim can be computed again, and what it does not cover."""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from post_dist.errors import ArtifactRefused
from post_dist.privacy.accounting import account, composed_epsilon, rdp_epsilon
from post_dist.privacy.ledger import Spending
from post_dist.privacy.plan import RELATION, UNIT, PrivacyPlan

_NOT_COVERED = [
    "the choice of template, label words, prompt length and other settings, where the private data were looked at for it",
    "the scores of `post-dist evaluate` on the private data",
    "other prompts from the same data: `post-dist budget` adds them up",
    "several rows of one person: the unit is one row, after repeated texts were dropped",
    "the time that the run took, for whoever can watch the machine",
]
_SEEDED = "everything: the noise came from a seed and can be taken off again"
_TOLERANCE = 1e-3
_LEAST_NOISE, _MOST_NOISE = 0.2, 1e4
_MOST_STEPS, _MOST_TIMES, _MOST_TRIALS, _MOST_EPSILON = 10**6, 100, 10**4, 200.0
"""Claims beyond these say nothing, or take hours to compute."""


def privacy_statement(spending: Spending) -> dict[str, Any]:
    """What may be said of a run that is done; steps that were begun again count for more."""
    plan, cost = spending.plan, account(spending.plan)
    epsilon = (
        composed_epsilon(spending.plans(), plan.delta) if spending.repeated_steps else cost.epsilon
    )
    return {
        "private": plan.private,
        "epsilon": epsilon if plan.private else None,
        **asdict(plan),
        "steps_repeated": {str(times): count for times, count in spending.repeated_steps.items()},
        "unit": UNIT,
        "neighbouring_relation": RELATION,
        "sampling": "Poisson",
        "accountant": cost.accountant,
        "cross_checks": cost.cross_checks,
        "epsilon_at_delta": cost.epsilon_at if plan.private else {},
        "true_positive_rate_at_1_percent_false": cost.true_positive_rate if plan.private else 1.0,
        "not_covered": _NOT_COVERED if plan.private else [_SEEDED],
    }


def statement_problems(statement: dict[str, Any]) -> list[str]:
    """Compute a statement's epsilon again from its own figures; what does not hold, in words.

    Args:
        statement: untrusted.

    Raises:
        ArtifactRefused: figures are missing or are none.
    """
    try:
        plan = PrivacyPlan(**{field.name: statement[field.name] for field in fields(PrivacyPlan)})
        repeated = {int(times): count for times, count in statement["steps_repeated"].items()}
        claim = statement["epsilon"]
        if not _can_be_computed(plan, repeated) or not (claim is None or _lies(claim, 0, math.inf)):
            raise ValueError
        plans = plan.spent({1: plan.steps - sum(repeated.values())} | repeated)
        beyond = rdp_epsilon(plans, plan.delta) > _MOST_EPSILON
        true = math.inf if beyond else composed_epsilon(plans, plan.delta)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise ArtifactRefused(
            "privacy.json lacks figures that its epsilon could be computed from"
        ) from None
    if not plan.private:
        return [] if claim is None else ["its noise came from a seed, yet it claims an epsilon"]
    if claim is None:
        return ["it claims no epsilon"]
    if beyond:
        return [f"its own figures give an epsilon above {_MOST_EPSILON:g}, which promises nothing"]
    return (
        [f"it claims epsilon {claim:.4f}, but its own figures give {true:.4f}"]
        if true > claim + _TOLERANCE
        else []
    )


def _can_be_computed(plan: PrivacyPlan, repeated: Mapping[int, int]) -> bool:
    """Whether untrusted figures are numbers that an accountant can take, in a time that is worth it."""
    search = plan.mean_trials, plan.score_noise_multiplier
    return (
        all(
            type(count) is int and 1 <= count <= _MOST_STEPS
            for count in (plan.steps, *repeated.values())
        )
        and all(1 < times <= _MOST_TIMES for times in repeated)
        and all(_lies(chance, 1e-300, 1) for chance in (plan.sampling_probability, plan.delta))
        and _lies(plan.noise_multiplier, _LEAST_NOISE, _MOST_NOISE)
        and (
            search == (None, None)
            or (
                _lies(search[0], 1.001, _MOST_TRIALS)
                and _lies(search[1], _LEAST_NOISE, _MOST_NOISE)
            )
        )
        and (plan.mean_trials is not None or sum(repeated.values()) <= plan.steps)
    )


def _lies(number: object, least: float, most: float) -> bool:
    return type(number) in (int, float) and least <= number <= most  # type: ignore[operator]
