"""Checks of the training loop, ledger, accounting and claim, like those of `checks.py`."""

import json
import math
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from privacy.checks import CPU, folder, fresh_source, part, plan_of
from scipy import stats

from post_dist.runtime.distributed import World

# --- the loop, the ledger, a restart ---


class ToyTask:
    """20 examples and a parameter of 50 numbers, in place of a model's task."""

    def __init__(self) -> None:
        self.examples = range(20)

    def parameters(self, section: Any) -> list[torch.Tensor]:
        return [torch.zeros(50)]

    def optimizer(
        self, section: Any, parameters: list[torch.Tensor], learning_rate: float
    ) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=learning_rate)


def toy_gradients(examples: Sequence[int], scale: float) -> Iterator[list[torch.Tensor]]:
    """Yield micro-batches of two. The gradient of example e has its weight in coordinate e."""
    for start in range(0, len(examples), 2):
        chunk = examples[start : start + 2]
        gradients = torch.zeros(len(chunk), 50)
        gradients[torch.arange(len(chunk)), torch.tensor(chunk)] = scale
        yield [gradients]


def train_toy(
    place: Path,
    source: Any,
    plan: Any,
    *,
    cap: float | None = None,
    scale: float = 1.0,
    finish: bool = True,
) -> torch.Tensor:
    """Train 50 numbers privately in a folder; resumes from what it finds there."""
    from post_dist.config.schema import RunConfig

    trainer = part("privacy.trainer")
    ledger = part("privacy.ledger")

    class ToyTrainer(trainer.PrivateTrainer):
        def micro_gradients(
            self, parameters: Sequence[torch.Tensor], examples: Sequence[int]
        ) -> Iterator[list[torch.Tensor]]:
            return toy_gradients(examples, scale)

    config = RunConfig.model_validate({"name": "toy", "tune": {"schedule": "constant"}})
    with ledger.lock_ledger(place / "ledger.jsonl") as descriptor:
        held = ledger.LedgerRun(place / "ledger.jsonl", descriptor, source.run, plan, cap)
        checkpoints = place / "checkpoints" / source.run
        world = World(0, 1, 0, "none", CPU)
        run = trainer.PrivateRun(plan, source, held, checkpoints, "toy", world)
        settings = trainer.TrialSettings(0.1, plan.max_grad_norm)
        (parameter,) = ToyTrainer(ToyTask(), config, run).train(settings, 0, checkpoints)
        if finish:
            held.finish()
    return parameter.detach()


def spendings(place: Path) -> dict[str, Any]:
    return part("privacy.ledger").read_ledger(place / "ledger.jsonl")


def every_step_is_charged_and_noised_also_when_empty() -> None:
    trainer = part("privacy.trainer")
    save = trainer.save_tensors
    states = []

    def watched(checkpoints: Path, step: int, tensors: dict[str, torch.Tensor]) -> None:
        states.append(tensors["0"].detach().clone())
        save(checkpoints, step, tensors)

    with folder() as place:
        plan = plan_of(sampling_probability=1e-9, steps=4)
        with mock.patch.object(trainer, "save_tensors", watched):
            train_toy(place, fresh_source(), plan)
        assert len(states) == 4, "a step without examples was skipped"
        for before, after in pairwise([torch.zeros(50), *states]):
            assert not torch.equal(before, after)
        assert spendings(place)["run"].charged_steps == 4


def intents_are_on_disk_before_the_noise() -> None:
    source = fresh_source()
    kind = type(source)
    normal = kind.normal
    fsync = os.fsync
    intents = []
    flushes = []
    synced = []

    with folder() as place:

        def watched_normal(self: Any, count: int, *purpose: object) -> np.ndarray:
            if purpose and purpose[0] == "noise":
                lines = (place / "ledger.jsonl").read_text().splitlines()
                steps = [line for line in lines if json.loads(line)["row"] == "step"]
                intents.append(len(steps))
                flushes.append(len(synced))
            return normal(self, count, *purpose)

        def watched_fsync(descriptor: int) -> None:
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith("ledger.jsonl"):
                synced.append(descriptor)
            fsync(descriptor)

        with (
            mock.patch.object(kind, "normal", watched_normal),
            mock.patch.object(os, "fsync", watched_fsync),
        ):
            train_toy(place, source, plan_of())
    assert intents == [1, 2, 3, 4, 5, 6]
    assert flushes == [2, 3, 4, 5, 6, 7], "an intent was not flushed"


def a_restart_repeats_or_pays() -> None:
    with folder() as place:
        source = fresh_source()
        plan = plan_of()
        kept = place / "checkpoints" / "run"
        straight = train_toy(place, source, plan)
        assert spendings(place)["run"].charged_steps == 6

        shutil.rmtree(kept)
        again = train_toy(place, source, plan)
        assert torch.equal(again, straight), "the same run again must be the same"
        charged = spendings(place)["run"].charged_steps
        assert charged == 6, "a repeated step was charged though its noise is the same"

        shutil.rmtree(kept)
        train_toy(place, source, plan, scale=0.01)
        charged = spendings(place)["run"].charged_steps
        assert charged > 6, "steps on another gradient were not charged"


def a_budget_adds_up_all_runs_and_holds_its_cap() -> None:
    errors = part("errors")
    accounting = part("privacy.accounting")
    with folder() as place:
        ledger = place / "ledger.jsonl"
        plan = plan_of(sampling_probability=0.05)
        one = accounting.account(plan).epsilon
        train_toy(place, fresh_source("a"), plan)
        train_toy(place, fresh_source("b"), plan, finish=False)
        budget = part("privacy.ledger").budget_of(ledger, None)
        assert [run["finished"] for run in budget["runs"]] == [True, False]
        assert one < budget["epsilon"] < 2 * one + 0.01
        together = accounting.account(replace(plan, steps=12)).epsilon
        assert abs(budget["epsilon"] - together) < 1e-3
        before = ledger.read_text()
        try:
            train_toy(place, fresh_source("c"), plan, cap=budget["epsilon"] + 0.01)
        except errors.PrivacyRefused:
            assert ledger.read_text() == before
        else:
            raise AssertionError("a run exceeded the cap")


def a_checkpoint_ahead_of_its_ledger_is_charged() -> None:
    """As after an older copy of the ledger was put back."""
    with folder() as place:
        source = fresh_source()
        plan = plan_of()
        path = place / "ledger.jsonl"
        train_toy(place, source, plan, finish=False)
        opened_and_two_steps = path.read_text().splitlines(keepends=True)[:3]
        path.write_text("".join(opened_and_two_steps))
        assert spendings(place)["run"].charged_steps == 2
        train_toy(place, source, plan)
        charged = spendings(place)["run"].charged_steps
        assert charged == 6, "steps that the checkpoint has taken are not in the ledger"


def a_run_keeps_its_plan() -> None:
    with folder() as place:
        source = fresh_source()
        train_toy(place, source, plan_of(), finish=False)
        try:
            train_toy(place, source, plan_of(noise_multiplier=0.3))
        except part("errors").PrivacyRefused:
            return
        raise AssertionError("a run resumed with less noise than it had started with")


def a_full_disk_stops_a_step_before_its_noise() -> None:
    ledger = part("privacy.ledger")
    with folder() as place, ledger.lock_ledger(place / "ledger.jsonl") as descriptor:
        run = ledger.LedgerRun(place / "ledger.jsonl", descriptor, "run", plan_of(), None)
        before = (place / "ledger.jsonl").read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
        try:
            run.intend(0, 0, "a" * 64)
        except part("errors").EnvironmentFault:
            pass
        else:
            raise AssertionError("a step started though its intent is not whole on the disk")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (place / "ledger.jsonl").read_bytes() == before, "half a row was left"


# --- accounting and claims ---

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
        assert abs(accounting.composed_epsilon([plan], delta) - epsilon) < 3e-11


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
    accounting = part("privacy.accounting")
    for target, sigma in CALIBRATED.items():
        plan = accounting.private_plan(config_of(target_epsilon=target))
        epsilon = accounting.account(plan).epsilon
        assert target - 0.02 < epsilon <= target
        assert plan.noise_multiplier == sigma


def calibration_of_a_search_gives_the_known_noise() -> None:
    search = {"mean_trials": 3, "learning_rate": [0.1]}
    config = config_of(tune_section(search=search), target_epsilon=3.0)
    assert part("privacy.accounting").private_plan(config).noise_multiplier == 0.7227


def calibration_refuses_targets_out_of_range() -> None:
    accounting = part("privacy.accounting")
    search = {"mean_trials": 3, "learning_rate": [0.1]}
    refused = {
        "up to 200 reaches": config_of(tune_section(search=search), target_epsilon=0.5),
        "noise multiplier below 0.2": config_of(tune_section(steps=1), target_epsilon=60.0),
    }
    for message, config in refused.items():
        found = ""
        try:
            accounting.private_plan(config)
        except part("errors").InputError as error:
            found = str(error)
        assert message in found, "a target was accepted that needs noise out of range"


def the_plan_is_declared_and_never_counted() -> None:
    plan = part("privacy.accounting").private_plan(config_of(noise_multiplier=1.0))
    assert plan.expected_batch_size == 60.0
    assert plan.sampling_probability == 0.01
    assert math.isclose(plan.delta, 6000**-1.1)
    assert plan.delta < 1 / 6000


def spending_of(plan: Any, intents: dict[tuple[int, int], set[str]]) -> Any:
    return part("privacy.ledger").Spending(plan, "", intents)


ONCE = {(0, step): {"a"} for step in range(6)}
"""The intents of six steps that were each started once."""


def seeded_noise_is_not_called_private() -> None:
    plan = plan_of(noise_source="seeded", sampling_probability=0.05)
    claim = part("privacy.statement").privacy_statement(spending_of(plan, ONCE))
    assert claim["private"] is False
    assert claim["epsilon"] is None
    assert part("privacy.accounting").composed_epsilon([plan], 1e-5) == math.inf


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
    worse = {
        "epsilon": 0.5,
        "noise_multiplier": 0.5,
        "steps": 60,
        "sampling_probability": 0.2,
        "steps_repeated": {"2": 5},
        "epsilon_at_delta": dict.fromkeys(claim["epsilon_at_delta"], 0.5),
        rate: 0.01,
        "cross_checks": claim["cross_checks"] | {"rdp": 0.5},
        "accountant": "another one",
        "private": False,
        "unit": "one person",
        "neighbouring_relation": "replace one",
        "sampling": "without replacement",
        "not_covered": claim["not_covered"][1:],
        "delta": 0.02,
    }
    for name in claim:
        missing = {key: value for key, value in claim.items() if key != name}
        with suppress(part("errors").ArtifactRefused):
            assert statement.statement_problems(missing), f"{name} may be missing"
    for field, better in worse.items():
        problems = statement.statement_problems(claim | {field: better})
        assert problems, f"a false {field} was not detected"


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
    every_step_is_charged_and_noised_also_when_empty,
    intents_are_on_disk_before_the_noise,
    a_restart_repeats_or_pays,
    a_budget_adds_up_all_runs_and_holds_its_cap,
    a_checkpoint_ahead_of_its_ledger_is_charged,
    a_run_keeps_its_plan,
    a_full_disk_stops_a_step_before_its_noise,
    accountants_give_the_known_numbers,
    the_library_composes_as_by_hand,
    calibration_meets_its_target_from_below,
    calibration_of_a_search_gives_the_known_noise,
    calibration_refuses_targets_out_of_range,
    the_plan_is_declared_and_never_counted,
    seeded_noise_is_not_called_private,
    statements_hold_what_was_charged,
    a_repeated_step_costs_what_its_one_sample_tells,
    accountants_must_agree,
    untrusted_statements_are_refused_soon,
]
