"""Checks of the accounting and the claim, like those of `checks.py`."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
from privacy.checks import on_a_coarse_grid, part, plan_of
from scipy import stats

GOLDEN = [
    (0.0152, 1973, 0.8, 4.9e-6, 6.99, 7.74),
    (0.0298, 1680, 0.9, 4.7e-5, 9.16, 10.13),
    (0.0939, 1064, 1.5, 7.8e-5, 10.86, 11.93),
    (0.0341, 878, 1.0, 2.6e-6, 7.11, 7.77),
    (1.0, 1, 1.0, 1e-5, 4.377, 4.73),
]
"""q, steps, sigma, delta; epsilon by PLD and by RDP, computed before this package existed."""

HAND_COMPOSED = [
    ((0.0152, 1973, 0.8, 4.9e-6, None), 6.986742281337632),
    ((0.0939, 1064, 1.5, 7.8e-5, None), 10.859384143750496),
    ((1.0, 1, 1.0, 1e-5, None), 4.3771781000517676),
    ((0.05, 6, 0.7, 1e-5, None), 3.5425997406858887),
    ((0.0341, 878, 1.0, 2.6e-6, 10.0), 7.121981634590325),
]
"""q, steps, sigma, delta, score noise; epsilon by privacy loss distributions composed by hand."""


def accountants_give_the_known_numbers() -> None:
    for q, steps, sigma, delta, pld, rdp in GOLDEN:
        plan = plan_of(sampling_probability=q, steps=steps, noise_multiplier=sigma, delta=delta)
        try:
            cost = part("privacy.accounting").account(plan)
        except part("errors").PrivacyRefused as error:
            raise AssertionError("the accountants disagree on a plan that is known") from error
        assert abs(cost.epsilon - pld) < 0.01
        assert abs(cost.cross_checks["rdp"] - rdp) < 0.011
        assert cost.epsilon <= cost.cross_checks["prv"] + 0.02
        assert cost.epsilon <= cost.cross_checks["rdp"]


def the_library_composes_as_by_hand() -> None:
    accounting = part("privacy.accounting")
    for (q, steps, sigma, delta, score), epsilon in HAND_COMPOSED:
        plan = plan_of(
            sampling_probability=q,
            steps=steps,
            noise_multiplier=sigma,
            delta=delta,
            score_noise_multiplier=score,
        )
        # Fourier transforms of different processors differ in the ninth digit.
        assert abs(accounting.composed_epsilon([plan], delta) - epsilon) < 1e-7


CALIBRATED = {1.0: 0.7786, 3.0: 0.5709, 8.0: 0.4065}
"""Target epsilon -> sigma, by the root finder that came before dp-accounting's calibration."""


def tune_section(**changes: Any) -> dict[str, Any]:
    return {"batch_size": 60, "steps": 50} | changes


def config_of(tune: dict[str, Any] | None = None, **privacy: Any) -> Any:
    from post_dist.config.schema import RunConfig

    section = {"enabled": True, "declared_examples": 6000} | privacy
    return RunConfig.model_validate(
        {"name": "a", "privacy": section, "tune": tune or tune_section()}
    )


def calibration_meets_its_target_from_below() -> None:
    calibration = part("privacy.calibration")
    for target, sigma in CALIBRATED.items():
        plan = calibration.private_plan(config_of(target_epsilon=target))
        epsilon = part("privacy.accounting").account(plan).epsilon
        assert target - 0.02 < epsilon <= target
        assert plan.noise_multiplier == sigma


def calibration_gives_no_more_noise_than_needed() -> None:
    """Many steps that reveal little each: a coarse interval gives sigma 12.38 for them."""
    accounting = part("privacy.accounting")
    calibrated = part("privacy.calibration").calibrated
    plan = plan_of(sampling_probability=0.001, steps=10_000, delta=10**-6.6)
    found = calibrated(plan, 0.1)
    assert found.noise_multiplier < 4.03
    assert 0.0998 <= accounting.account(found).epsilon <= 0.1
    # A target that no sigma meets on the coarse interval.
    assert calibrated(plan, 0.01).noise_multiplier < 36


def calibration_of_a_search_gives_the_known_noise() -> None:
    search = {"mean_trials": 3, "learning_rate": [0.1]}
    config = config_of(tune_section(search=search), target_epsilon=3.0)
    assert part("privacy.calibration").private_plan(config).noise_multiplier == 0.7227


def calibration_refuses_targets_out_of_range() -> None:
    calibration = part("privacy.calibration")
    search = {"mean_trials": 3, "learning_rate": [0.1]}
    refused = {
        "up to 200 reaches": config_of(tune_section(search=search), target_epsilon=0.5),
        "noise multiplier below 0.2": config_of(tune_section(steps=1), target_epsilon=60.0),
    }
    for message, config in refused.items():
        found = ""
        try:
            calibration.private_plan(config)
        except part("errors").InputError as error:
            found = str(error)
        assert message in found, "a target was accepted that needs noise out of range"


def the_plan_is_declared_and_never_counted() -> None:
    plan = part("privacy.calibration").private_plan(config_of(noise_multiplier=1.0))
    assert plan.expected_batch_size == 60.0
    assert plan.sampling_probability == 0.01
    assert math.isclose(plan.delta, 6000**-1.1)
    assert plan.delta < 1 / 6000


def spending_of(plan: Any, intents: dict[tuple[int, int], set[str]]) -> Any:
    return part("privacy.spending").Spending(plan, "", intents)


ONCE = {(0, step): {"a"} for step in range(6)}
"""The intents of six steps that were each started once."""


@on_a_coarse_grid
def seeded_noise_is_not_called_private() -> None:
    plan = plan_of(noise_source="seeded", sampling_probability=0.05)
    claim = part("privacy.statement").privacy_statement(spending_of(plan, ONCE))
    assert claim["private"] is False
    assert claim["epsilon"] is None
    assert part("privacy.accounting").composed_epsilon([plan], 1e-5) == math.inf


@on_a_coarse_grid
def statements_hold_what_was_charged() -> None:
    statement = part("privacy.statement")
    plan = plan_of(sampling_probability=0.05)
    claim = statement.privacy_statement(spending_of(plan, ONCE))
    repeated = ONCE | {(0, 2): {"a", "b"}}
    twice = statement.privacy_statement(spending_of(plan, repeated))
    assert twice["epsilon"] > claim["epsilon"] + 1e-3, "a repeated step is not in the claim"
    for delta, epsilon in claim["epsilon_at_delta"].items():
        at_delta = twice["epsilon_at_delta"][delta]
        assert at_delta > epsilon + 1e-3, f"a repeated step is not in the claim at {delta}"
    rate = "true_positive_rate_at_1_percent_false"
    assert twice[rate] > claim[rate] + 1e-5, "a repeated step is not in the bound of attacks"
    assert statement.statement_problems(claim) == []
    assert statement.statement_problems(twice) == []
    # What `init` writes from the private table is named. Earlier statements did not name it.
    released = [line for line in claim["not_covered"] if "`post-dist init`" in line]
    assert "label names" in released[0]
    assert all(name in released[1] for name in ("declared_examples", "delta", "batch", "steps"))
    earlier = [line for line in claim["not_covered"] if line not in released]
    assert statement.statement_problems(claim | {"not_covered": earlier}) == []
    # Words come first, because a plan with other numbers takes a second to account.
    worse = {
        "unit": "one person",
        "neighbouring_relation": "replace one",
        "sampling": "without replacement",
        "not_covered": claim["not_covered"][1:],
        "accountant": "another one",
        "private": False,
        "epsilon": 0.5,
        "noise_multiplier": 0.5,
        "steps": 60,
        "sampling_probability": 0.2,
        "steps_repeated": {"2": 5},
        "epsilon_at_delta": dict.fromkeys(claim["epsilon_at_delta"], 0.5),
        "epsilon_for_groups": dict.fromkeys(claim["epsilon_for_groups"], 0.5),
        rate: 0.01,
        "cross_checks": claim["cross_checks"] | {"rdp": 0.5},
        "delta": 0.02,
    }
    # Version 0.1.0 had no groups, no warnings and no other unit than an example.
    for name in claim.keys() - {"epsilon_for_groups", "warnings", "clip_quantile"}:
        missing = {key: value for key, value in claim.items() if key != name}
        with suppress(part("errors").ArtifactRefused):
            assert statement.statement_problems(missing), f"{name} may be missing"
    for field, better in worse.items():
        with suppress(part("errors").ArtifactRefused):
            problems = statement.statement_problems(claim | {field: better})
            assert problems, f"a false {field} was not detected"


def groups_cost_what_their_examples_tell_together() -> None:
    """Compare with delta by integration: a mixture of normals with binomial weights.

    The bound holds for any mechanism, so it is not tight for this one.
    """
    plan = plan_of(sampling_probability=0.3, steps=1, noise_multiplier=3.0)
    found = part("privacy.accounting").group_epsilons([plan], plan.delta)
    assert list(found) == ["2", "4", "8"]
    search = replace(plan, mean_trials=3.0, score_noise_multiplier=10.0)
    of_search = part("privacy.accounting").group_epsilons([search], plan.delta)
    assert all(of_search[size] > found[size] for size in found)
    x = np.linspace(-40, 50, 2_000_001)
    without = stats.norm.pdf(x, 0, 3.0)
    for size, epsilon in found.items():
        weights = stats.binom.pmf(np.arange(int(size) + 1), int(size), 0.3)
        with_group = sum(
            weight * stats.norm.pdf(x, moved, 3.0) for moved, weight in enumerate(weights)
        )
        delta = np.trapezoid(np.maximum(with_group - math.exp(epsilon) * without, 0), x)
        message = f"epsilon {epsilon} for {size} holds at delta {delta}, not {plan.delta}"
        assert delta <= plan.delta * 1.01, message
        alone = part("privacy.accounting").account(plan).epsilon
        assert int(size) * alone < epsilon < 3 * int(size) * alone
    repeated = spending_of(plan, {(0, 0): {"a", "b"}})
    claim = part("privacy.statement").privacy_statement(repeated)
    assert claim["epsilon_for_groups"]["2"] > found["2"] + 0.1, "repeats cost groups nothing"


@on_a_coarse_grid
def groups_that_are_not_protected_have_no_epsilon() -> None:
    plan = plan_of(sampling_probability=0.3, noise_multiplier=1.5)
    problems = part("privacy.statement").statement_problems
    claim = part("privacy.statement").privacy_statement(spending_of(plan, ONCE))
    groups = claim["epsilon_for_groups"]
    assert groups["2"] < groups["4"] < 200
    assert groups["8"] is None
    assert problems(claim) == []
    believed = [
        {"2": groups["2"], "4": groups["4"]},
        {"2": groups["2"], "4": None, "8": None},
    ]
    for known in believed:
        assert problems(claim | {"epsilon_for_groups": known}) == [], "an older file is refused"
    for false in (groups | {"8": 150.0}, groups | {"16": None}, ["none"], "none", None):
        assert problems(claim | {"epsilon_for_groups": false}), f"{false} was believed"


def attacks_are_bounded_at_one_percent() -> None:
    plan = plan_of(sampling_probability=1.0, steps=1, noise_multiplier=1.0)
    cost = part("privacy.accounting").account(plan)
    exact = stats.norm.cdf(stats.norm.ppf(0.01) + 1)
    assert exact <= cost.true_positive_rate < exact + 0.005
    assert cost.epsilon_at["1e-06"] > cost.epsilon + 0.1, "a smaller delta costs no more"


def a_seeded_run_voids_the_others() -> None:
    accounting = part("privacy.accounting")
    for plans in ([True, False], [False, True]):
        made = [plan_of(noise_source="system" if private else "seeded") for private in plans]
        assert accounting.composed_epsilon(made, 1e-5) == math.inf


@on_a_coarse_grid
def a_large_delta_is_warned_of() -> None:
    plan = plan_of(delta=5e-3, declared_examples=240)
    claim = part("privacy.statement").privacy_statement(spending_of(plan, ONCE))
    assert ["not below 1 / 240" in warning for warning in claim["warnings"]] == [True]
    assert part("privacy.statement").statement_problems(claim) == []
    assert part("privacy.statement").statement_problems(claim | {"warnings": []})
    assert plan_of(delta=5e-3, declared_examples=190).warnings() == []


@on_a_coarse_grid
def accountants_must_agree() -> None:
    accounting = part("privacy.accounting")
    plan = plan_of(sampling_probability=0.02, steps=200)
    pld = accounting._pld
    assert accounting.account.__wrapped__(plan).epsilon > 1
    for factor in (0.8, 1.25):

        def wrong(plans: Sequence[Any], interval: float, factor: float = factor) -> Any:
            (tried,) = plans
            noise = factor * tried.noise_multiplier
            return pld((replace(tried, noise_multiplier=noise),), interval)

        with mock.patch.object(accounting, "_pld", wrong):
            try:
                accounting.account.__wrapped__(plan)
            except part("errors").PrivacyRefused:
                continue
        raise AssertionError(f"a loss for {factor} of the noise was believed")
    # PLD and RDP are both upper bounds, so either may be the tighter one.
    for checks, agree in (
        ({"pld": 0.0130, "rdp": 0.0092, "prv": 0.0182}, True),
        ({"pld": 1.0, "rdp": 0.94, "prv": 1.0}, False),
    ):
        refused = False
        try:
            accounting._check_agreement(checks)
        except part("errors").PrivacyRefused:
            refused = True
        assert refused != agree, f"{checks} are refused: {refused}"


def little_loss_in_each_step_is_accounted_tightly() -> None:
    accounting = part("privacy.accounting")
    for sigma in (10.0, 30.0, 100.0):
        plan = plan_of(sampling_probability=0.001, steps=10_000, noise_multiplier=sigma, delta=1e-5)
        cost = accounting.account(plan)
        assert cost.epsilon < cost.cross_checks["rdp"]
    # With nearly no noise, the loss of a step is beyond what fp64 holds.
    assert accounting._interval([plan_of(noise_multiplier=1e-200)]) == accounting.FINE
    # Older statements of such plans have another interval, and higher numbers.
    statement = part("privacy.statement")
    begun = {(0, step): {"a"} for step in range(plan.steps)}
    claim = statement.privacy_statement(spending_of(plan, begun))
    older = "PLD (dp-accounting, discretisation 0.0001)"
    assert older != claim["accountant"]
    assert statement.statement_problems(claim) == []
    assert statement.statement_problems(claim | {"accountant": older}) == []


def budgets_of_many_runs_are_not_overstated() -> None:
    accounting = part("privacy.accounting")
    delta = 10**-6.6
    plan = plan_of(sampling_probability=0.001, steps=10_000, delta=delta)
    runs = [replace(plan, noise_multiplier=2 + number / 100) for number in range(12)]
    # Twelve times the steps with the noise of the first and of the last run.
    most, least = (
        accounting.composed_epsilon([replace(run, steps=120_000)], delta)
        for run in (runs[0], runs[-1])
    )
    assert least < accounting.composed_epsilon(runs, delta) < most


@on_a_coarse_grid
def a_resumed_run_keeps_its_noise() -> None:
    """A version that calibrates otherwise goes on with the plan that the ledger has."""
    resumed = part("privacy.private_run")._resumed
    plan = plan_of(noise_multiplier=3.0)
    target = part("privacy.accounting").account(plan).epsilon
    for begun, kept in (
        (replace(plan, noise_multiplier=3.1), True),
        (replace(plan, noise_multiplier=2.9), False),
        (replace(plan, noise_multiplier=3.1, steps=plan.steps - 1), False),
    ):
        spending = part("privacy.spending").DataSpending({"a": spending_of(begun, ONCE)})
        assert resumed(plan, target, spending, "a") == (begun if kept else plan)
        assert resumed(plan, target, spending, "another") == plan
        assert resumed(plan, None, spending, "a") == plan, "the run file gives the noise"


@on_a_coarse_grid
def a_repeated_step_costs_what_its_one_sample_tells() -> None:
    """Compare with delta by integration.

    The k sums of one sample are a mixture of two normals whose mean has a k-th of the variance.
    """
    times = 8
    plan = plan_of(sampling_probability=0.05, steps=1)
    intents = {(0, 0): {str(number) for number in range(times)}}
    plans = spending_of(plan, intents).plans()
    epsilon = part("privacy.accounting").composed_epsilon(plans, plan.delta)
    deviation = plan.noise_multiplier / times**0.5
    x = np.linspace(-12 * deviation, 1 + 12 * deviation, 1_000_001)
    without = stats.norm.pdf(x, 0, deviation)
    with_one = 0.95 * without + 0.05 * stats.norm.pdf(x, 1, deviation)
    delta = np.trapezoid(np.maximum(with_one - math.exp(epsilon) * without, 0), x)
    tight = 0.9 * plan.delta < delta <= plan.delta * 1.001
    assert tight, f"epsilon {epsilon} holds at delta {delta}, not {plan.delta}"


@on_a_coarse_grid
def untrusted_statements_are_refused_soon() -> None:
    """A false statement is refused or called false, soon, and raises no other error."""
    statement = part("privacy.statement")
    errors = part("errors")
    claim = statement.privacy_statement(spending_of(plan_of(), ONCE))
    bad: list[dict[str, Any]] = [
        {"steps": 10_000, "sampling_probability": 1, "noise_multiplier": 0.2},
        {"mean_trials": 0.5, "score_noise_multiplier": 10.0},
        {"mean_trials": 5.0, "score_noise_multiplier": 0.0},
        {"mean_trials": 5.0, "score_noise_multiplier": None},
        {"noise_multiplier": 1e200},
        {"steps_repeated": {"2": 7}},
        {"steps_repeated": {"1000000": 1}},
        {"steps_repeated": [2]},
        {"steps": True},
        {"epsilon": "none"},
        {"epsilon": math.nan},
        {"max_grad_norm": [1]},
    ]
    for changes in bad:
        start = time.monotonic()
        with suppress(errors.ArtifactRefused):
            assert statement.statement_problems(claim | changes), f"{changes} was believed"
        assert time.monotonic() - start < 20, f"{changes} took long"


CHECKS: list[Callable[[], None]] = [
    accountants_give_the_known_numbers,
    the_library_composes_as_by_hand,
    calibration_meets_its_target_from_below,
    calibration_gives_no_more_noise_than_needed,
    calibration_of_a_search_gives_the_known_noise,
    calibration_refuses_targets_out_of_range,
    the_plan_is_declared_and_never_counted,
    seeded_noise_is_not_called_private,
    statements_hold_what_was_charged,
    a_repeated_step_costs_what_its_one_sample_tells,
    groups_cost_what_their_examples_tell_together,
    groups_that_are_not_protected_have_no_epsilon,
    attacks_are_bounded_at_one_percent,
    a_seeded_run_voids_the_others,
    a_large_delta_is_warned_of,
    accountants_must_agree,
    little_loss_in_each_step_is_accounted_tightly,
    budgets_of_many_runs_are_not_overstated,
    a_resumed_run_keeps_its_noise,
    untrusted_statements_are_refused_soon,
]
