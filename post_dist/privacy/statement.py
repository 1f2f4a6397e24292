"""`privacy.json`: what a prompt claims, in figures from which the claim can be computed again, and what it does not cover."""

import math
from dataclasses import asdict, fields
from typing import Any

from post_dist.errors import ArtefactRefused
from post_dist.privacy.accounting import account, composed_epsilon
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
_MOST_STEPS, _LEAST_NOISE = 10**6, 0.2


def privacy_statement(spending: Spending) -> dict[str, Any]:
    """What may be said of a run that is done; steps that were charged twice count twice."""
    plan, cost = spending.plan, account(spending.plan)
    epsilon = composed_epsilon(spending.plans(), plan.delta) if spending.repeated_steps else cost.epsilon
    return {
        "private": plan.private,
        "epsilon": epsilon if plan.private else None,
        **asdict(plan),
        "steps_repeated": spending.repeated_steps,
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
        ArtefactRefused: figures are missing or are none.
    """
    try:
        plan = PrivacyPlan(**{field.name: statement[field.name] for field in fields(PrivacyPlan)})
        repeated, claim = statement["steps_repeated"], statement["epsilon"]
        numbers = (plan.noise_multiplier, plan.sampling_probability, plan.delta, plan.steps, repeated + 1)
        sound = (
            all(type(number) in (int, float) and 0 < number < math.inf for number in numbers)
            and all(isinstance(count, int) and count <= _MOST_STEPS for count in (plan.steps, repeated))
            and max(plan.sampling_probability, plan.delta) <= 1
            and plan.noise_multiplier >= _LEAST_NOISE
        )
        if not sound:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ArtefactRefused("privacy.json lacks figures that its epsilon could be computed from") from None
    if not plan.private:
        return [] if claim is None else ["its noise came from a seed, yet it claims an epsilon"]
    if claim is None:
        return ["it claims no epsilon"]
    true = composed_epsilon(plan.spent(plan.steps + repeated, repeated), plan.delta)
    return [f"it claims epsilon {claim:.4f}, but its own figures give {true:.4f}"] if true > claim + _TOLERANCE else []
