"""`privacy.json`: the privacy claim of a prompt, the numbers behind it, and what it excludes."""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from post_dist.errors import ArtifactRefused
from post_dist.privacy.accounting import (
    FINE,
    MOST_GROUP_EPSILON,
    PRV_ABOVE,
    account,
    composed_epsilon,
    cost_of,
    group_epsilons,
    pld_name,
    rdp_epsilon,
)
from post_dist.privacy.calibration import LEAST_SIGMA
from post_dist.privacy.plan import MOST_DELTA, ONE_USER, RELATION, PrivacyPlan
from post_dist.privacy.spending import Spending

_SEVERAL_EXAMPLES = (
    "several examples of one person: the unit is one example, after repeated texts were dropped"
)
_SEVERAL_NAMES = "a person who has several names in the user column: the unit is one user"
_RELEASED = (
    "the label names and the name of the label column, which `post-dist init` copies from the "
    "private table",
    "the numbers that `post-dist init` takes from the rounded size of the private table: "
    "declared_examples, delta, batch size, steps, and whether there is a comparison",
)
_NOT_COVERED = [
    "the choice of template, label words, prompt length and other settings, where it was made by "
    "looking at the private data",
    *_RELEASED,
    "the scores of `post-dist evaluate` on the private data",
    "other prompts from the same data: `post-dist budget` adds them up",
    _SEVERAL_EXAMPLES,
    "the time that the run took, for anyone who can watch the machine",
]
_SEEDED = "everything: the noise came from a seed and can be subtracted"

_NOT_COVERED_0_1_0 = [
    "the choice of template, label words, prompt length and other settings, where the private data "
    "were looked at for it",
    "the scores of `post-dist evaluate` on the private data",
    "other prompts from the same data: `post-dist budget` adds them up",
    "several rows of one person: the unit is one row, after repeated texts were dropped",
    "the time that the run took, for whoever can watch the machine",
]
"""The wording of version 0.1.0."""

# Two machines agree on epsilon more closely than this.
_TOLERANCE = 1e-3

# More repeats of one step, or more repeated steps, take long to compute.
_MOST_TIMES = 100
_MOST_KINDS_OF_REPEATS = 3
_LEAST_NOISE_OF_REPEATS = 0.2
"""Each kind of repeats takes an accountant seconds, and the more, the smaller its noise is."""
_MOST_STEPS_OF_A_SEARCH = 10**6
_MOST_EPSILON = 200.0
_LEAST_SHARE_OF_TARGET = 0.5
"""A calibrated epsilon is close below its target, also where large steps of the noise are taken."""

_SETTINGS = (
    *("noise_multiplier", "sampling_probability", "declared_examples", "max_grad_norm"),
    *("clip_quantile", "noise_source"),
)
"""Fields of a statement that have the name of their setting."""

_GROUPS = "epsilon_for_groups"
_EPSILONS = ("epsilon_at_delta", _GROUPS)
_COMPUTED = frozenset(
    (
        *("private", "epsilon", "steps_repeated", "neighbouring_relation", "sampling"),
        *("accountant", "cross_checks", "true_positive_rate_at_1_percent_false", *_EPSILONS),
        *("not_covered", "warnings"),
    )
)
"""The fields of a statement, besides those of its plan.

Finished statements have these names, so `neighbouring_relation` keeps its British spelling.
"""


def privacy_statement(spending: Spending) -> dict[str, Any]:
    """Return the contents of `privacy.json` for a finished run.

    Repeated steps raise epsilon.
    """
    plan = spending.plan
    planned = account(plan)
    # Repeated steps and counts cost more than the plan, so all numbers follow from what was spent.
    cost = planned if spending.is_as_planned else cost_of(spending.plans(), plan)
    statement = {
        "private": plan.private,
        "epsilon": cost.epsilon,
        **asdict(plan),
        "steps_repeated": {str(times): count for times, count in spending.repeated_steps.items()},
        "neighbouring_relation": RELATION,
        "sampling": plan.sampler.name,
        "accountant": cost.accountant,
        "cross_checks": planned.cross_checks,
        "epsilon_at_delta": cost.epsilon_at,
        "epsilon_for_groups": group_epsilons(spending.plans(), plan.delta),
        "true_positive_rate_at_1_percent_false": cost.true_positive_rate,
        "not_covered": _not_covered(plan),
        "warnings": plan.warnings(),
    }
    # Noise from a seed protects nothing, so the epsilon of the accountants does not apply.
    if not plan.private:
        statement["epsilon"] = None
        statement["epsilon_at_delta"] = {}
        statement["epsilon_for_groups"] = {}
        statement["true_positive_rate_at_1_percent_false"] = 1.0
    return statement


def _not_covered(plan: PrivacyPlan) -> list[str]:
    """Return what the guarantee of a plan leaves out."""
    if not plan.private:
        return [_SEEDED]
    if plan.unit != ONE_USER:
        return _NOT_COVERED
    return [_SEVERAL_NAMES if line == _SEVERAL_EXAMPLES else line for line in _NOT_COVERED]


def statement_problems(statement: dict[str, Any]) -> list[str]:
    """Recompute a statement from its plan, and describe the claims that do not hold.

    Args:
        statement: contents of an untrusted `privacy.json`.

    Raises:
        ArtifactRefused: numbers are missing, or no accountant can take them.
    """
    claim, plan, repeated = _parse(statement)
    problems = _word_problems(statement, plan)
    if plan.misfit is not None:
        problems.append(plan.misfit)
    # A prompt with seeded noise must not claim an epsilon.
    if not plan.private:
        if claim is not None or any(statement.get(name) for name in _EPSILONS):
            problems.append("its noise came from a seed, yet it claims an epsilon")
        return problems
    if claim is None:
        return [*problems, "it claims no epsilon"]
    # Numbers within the bounds may still overflow in an accountant.
    try:
        computed = _numbers(plan, repeated)
    except (TypeError, ValueError, OverflowError):
        raise _not_computable() from None
    if computed is None:
        promise = f"its numbers give an epsilon above {_MOST_EPSILON:g}, which promises nothing"
        return [*problems, promise]
    # Version 0.1.0 stated no groups.
    if _GROUPS in statement:
        computed[_GROUPS] = group_epsilons(_spent(plan, repeated), plan.delta)
    # Older statements have one interval for all losses. It gives higher numbers than a finer one.
    if computed["accountant"].startswith("PLD") and statement.get("accountant") == pld_name(FINE):
        computed["accountant"] = pld_name(FINE)
    return problems + _delta_problems(plan) + _number_problems(statement, computed)


def settings_problems(statement: dict[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Describe where a statement is not that of the settings in its prompt's manifest.

    Args:
        statement: contents of an untrusted `privacy.json`.
        config: settings of an untrusted manifest. Those of a transferred prompt are not the
            owner's, and say nothing of privacy.
    """
    section = config.get("privacy")
    if not isinstance(section, dict):
        return []
    tune = config.get("tune")
    tune = tune if isinstance(tune, dict) else {}
    problems = []
    if section.get("enabled") is not True:
        problems.append("the manifest says that the prompt was tuned without privacy")
    # Where a setting is not given, the plan has computed it.
    settings = {name: section.get(name) for name in _SETTINGS}
    settings["delta"] = section.get("target_delta")
    search = tune.get("search") if isinstance(tune.get("search"), dict) else {}
    settings["mean_trials"] = search.get("mean_trials")
    settings["score_noise_multiplier"] = search.get(
        "score_noise_multiplier", tune.get("comparison_noise_multiplier")
    )
    settings["steps"] = section.get("steps") or tune.get("steps")
    settings["expected_batch_size"] = section.get("expected_batch_size") or tune.get("batch_size")
    for name, value in settings.items():
        if value is not None and statement.get(name) != value:
            problems.append(f"its `{name}` is not that of the settings in the manifest")
    # A run without a search has not computed how many trials it has.
    if statement.get("mean_trials") is not None and not search:
        problems.append("its `mean_trials` is not that of the settings in the manifest")
    target = section.get("target_epsilon")
    if section.get("noise_multiplier") is None and isinstance(target, float | int):
        problems += _target_problems(statement, target)
    return problems


def _target_problems(statement: dict[str, Any], target: float) -> list[str]:
    """Describe a claim far below the epsilon that its noise was calibrated for."""
    claim = statement.get("epsilon")
    # The least noise may give less than was wanted.
    is_calibrated = _is_between(statement.get("noise_multiplier"), 2 * LEAST_SIGMA, math.inf)
    if is_calibrated and _is_between(claim, 0, _LEAST_SHARE_OF_TARGET * target):
        return [f"it claims epsilon {claim:.4f}, and the manifest says that {target:g} was wanted"]
    return []


def _word_problems(statement: dict[str, Any], plan: PrivacyPlan) -> list[str]:
    """Describe the words of a statement that do not follow from its plan."""
    problems = []
    # Whoever passes the statement on would repeat a claim in other words.
    if set(statement) - {field.name for field in fields(PrivacyPlan)} - _COMPUTED:
        problems.append("it holds fields that post_dist does not write")
    # Version 0.1.0 gave no warnings.
    if statement.get("warnings", []) != plan.warnings():
        problems.append("its `warnings` are not those of its plan")
    words = {
        "private": plan.private,
        "neighbouring_relation": RELATION,
        "sampling": plan.sampler.name,
    }
    for name, true in words.items():
        given = statement.get(name)
        # 1 equals True.
        if type(given) is not type(true) or given != true:
            problems.append(f"its `{name}` is not {true!r}")
    # A reader must see everything that the guarantee leaves out.
    known = [_not_covered(plan)]
    # Earlier statements do not name what `init` releases. To tune again would spend budget.
    known.append([line for line in known[0] if line not in _RELEASED])
    if plan.private and plan.unit != ONE_USER:
        known.append(_NOT_COVERED_0_1_0)
    if statement.get("not_covered") not in known:
        problems.append("its `not_covered` leaves something out, or is not worded by post_dist")
    return problems


def _delta_problems(plan: PrivacyPlan) -> list[str]:
    """Describe a delta that is too large to protect anybody."""
    if plan.delta <= MOST_DELTA:
        return []
    return [f"its delta {plan.delta:.3g} is above {MOST_DELTA:g}"]


def _number_problems(statement: dict[str, Any], computed: dict[str, Any]) -> list[str]:
    """Compare the numbers of a statement with computed ones.

    A claim above the computed number is allowed, because it promises less.
    """
    problems = []
    for name, number in computed.items():
        # An entry that is not computed here would be passed on unchecked.
        claims = statement.get(name)
        if isinstance(number, dict) and isinstance(claims, dict) and set(claims) - set(number):
            problems.append(f"its `{name}` holds more than post_dist computes")
        for label, claimed, least in _pairs(name, claims, number):
            # No epsilon for a group promises nothing. Earlier statements leave such groups out.
            if name == _GROUPS and isinstance(claims, dict) and claimed is None:
                continue
            if least is None:
                problems.append(f"its numbers give {label} above {MOST_GROUP_EPSILON:g}")
            elif isinstance(least, str):
                if claimed != least:
                    problems.append(f"its {label} is not {least!r}")
            elif not _is_between(claimed, 0, math.inf):
                problems.append(f"its {label} is not a number")
            elif claimed < least - _TOLERANCE:
                problems.append(
                    f"it claims {label} {claimed:.4f}, but its numbers give {least:.4f}"
                )
    return problems


def _pairs(name: str, claimed: Any, computed: Any) -> list[tuple[str, Any, Any]]:
    """Return label, claim and computed value of each number in an entry of a statement."""
    if not isinstance(computed, dict):
        return [(name, claimed, computed)]
    given = claimed if isinstance(claimed, dict) else {}
    return [(f"{name} {key}", given.get(key), number) for key, number in computed.items()]


def _parse(statement: dict[str, Any]) -> tuple[float | None, PrivacyPlan, dict[int, int]]:
    """Read the claimed epsilon, the plan and the repeated steps of an untrusted statement.

    Raises:
        ArtifactRefused: numbers are missing or out of bounds.
    """
    # The file comes from the other party: any field may be missing or of any type.
    try:
        claim = statement["epsilon"]
        plan = PrivacyPlan(**_plan_fields(statement))
        repeated = {int(times): count for times, count in statement["steps_repeated"].items()}
        # "2" and "02" are one number, of which only one entry would be counted.
        plain = all(str(int(times)) == times for times in statement["steps_repeated"])
        usable = plain and _can_be_computed(plan, repeated)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise _not_computable() from None
    if not usable or not (claim is None or _is_between(claim, 0, math.inf)):
        raise _not_computable()
    return claim, plan, repeated


def _plan_fields(statement: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the plan in a statement. Version 0.1.0 had no adaptive clipping."""
    given = {"clip_quantile": None, **statement}
    return {field.name: given[field.name] for field in fields(PrivacyPlan)}


def _not_computable() -> ArtifactRefused:
    return ArtifactRefused("privacy.json lacks the numbers that its epsilon is computed from")


def _spent(plan: PrivacyPlan, repeated: Mapping[int, int]) -> list[PrivacyPlan]:
    """Return what a statement says was spent, as plans whose steps were all taken."""
    return plan.spent({1: plan.steps - sum(repeated.values()), **repeated})


def _numbers(plan: PrivacyPlan, repeated: Mapping[int, int]) -> dict[str, Any] | None:
    """Compute the numbers of a statement; None above an epsilon of `_MOST_EPSILON`."""
    plans = _spent(plan, repeated)
    # RDP is fast for any numbers, so it first rejects claims that promise nothing.
    if rdp_epsilon(plans, plan.delta) > _MOST_EPSILON:
        return None
    cost = cost_of(plans, plan)
    trial = replace(plan, mean_trials=None)
    pld = composed_epsilon([trial], plan.delta)
    # PRV takes minutes for some numbers, so its place beside PLD is checked instead.
    cross_checks = {"rdp": rdp_epsilon([trial], plan.delta), "prv": max(0.0, pld - PRV_ABOVE)}
    if plan.mean_trials is not None:
        cross_checks["pld"] = pld
    return {
        "epsilon": cost.epsilon,
        "accountant": cost.accountant,
        "cross_checks": cross_checks,
        "epsilon_at_delta": cost.epsilon_at,
        "true_positive_rate_at_1_percent_false": cost.true_positive_rate,
    }


def _can_be_computed(plan: PrivacyPlan, repeated: Mapping[int, int]) -> bool:
    """Return whether an accountant can take untrusted numbers in reasonable time."""
    if plan.out_of_bounds():
        return False
    if not all(type(count) is int and count >= 1 for count in repeated.values()):
        return False
    most_times = min(_MOST_TIMES, (plan.noise_multiplier / _LEAST_NOISE_OF_REPEATS) ** 2)
    if not all(1 < times <= most_times for times in repeated):
        return False
    if len(repeated) > _MOST_KINDS_OF_REPEATS:
        return False
    # A single run cannot repeat more steps than the plan has. A search has several runs.
    most = plan.steps if plan.mean_trials is None else _MOST_STEPS_OF_A_SEARCH
    return sum(repeated.values()) <= most


def _is_between(number: object, least: float, most: float) -> bool:
    """Return whether an untrusted value is a number between two bounds.

    True and False do not count as numbers.
    """
    # pyrefly: ignore[unsupported-operation]
    return type(number) in (int, float) and least <= number <= most
