"""What must hold of the training loop, the ledger, the accounting and the claim: checks like those of `checks.py`, used in the same way."""

import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
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

# -------------------------------------------------------------------------------------- the loop, the ledger, a restart


def toy_gradients(rows: list[int], *, scale: float = 1.0) -> Iterator[list[torch.Tensor]]:
    """Micro-batches of two examples; the gradient of row r has its weight in coordinate r."""
    for start in range(0, len(rows), 2):
        chunk = rows[start : start + 2]
        gradients = torch.zeros(len(chunk), 50)
        gradients[torch.arange(len(chunk)), torch.tensor(chunk)] = scale
        yield [gradients]


def train_toy(
    place: Path,
    source: Any,
    plan: Any,
    *,
    total: int = 20,
    cap: float | None = None,
    gradients: Callable = toy_gradients,
    finish: bool = True,
) -> torch.Tensor:
    """Train 50 numbers privately in a folder; goes on from what it finds there."""
    training, ledger = part("privacy.training"), part("privacy.ledger")
    parameter = torch.zeros(50)
    with ledger.lock_ledger(place / "ledger.jsonl") as descriptor:
        held = ledger.LedgerRun(place / "ledger.jsonl", descriptor, source.run, plan, cap)
        run = training.PrivateRun(plan, source, held, total, World(0, 1, 0, "none", CPU))
        optimizer = torch.optim.Adam([parameter], lr=0.1)
        training.train_privately(
            [parameter],
            gradients,
            optimizer,
            lambda step: 1.0,
            run,
            place / "checkpoints" / source.run,
            label="toy",
        )
        if finish:
            held.finish()
    return parameter.detach()


def spent(place: Path) -> dict[str, Any]:
    return part("privacy.ledger").read_ledger(place / "ledger.jsonl")


def every_step_is_charged_and_noised_also_when_empty() -> None:
    with folder() as place:
        source, plan = fresh_source(), plan_of(sampling_probability=1e-9, steps=4)
        states = []
        save = part("privacy.training").save_tensors
        with mock.patch.object(
            part("privacy.training"),
            "save_tensors",
            lambda *given: (states.append(given[2]["0"].clone()), save(*given)),
        ):
            train_toy(place, source, plan)
        assert len(states) == 4, "a step without examples was passed over"
        moved = [torch.zeros(50), *states]
        assert all(not torch.equal(before, after) for before, after in pairwise(moved))
        assert spent(place)["run"].charged_steps == 4


def intents_are_on_disk_before_the_noise() -> None:
    with folder() as place:
        source, plan, seen, synced = fresh_source(), plan_of(), [], []
        kind = type(source)
        normal = kind.normal

        def watch(self: Any, count: int, *purpose: object) -> np.ndarray:
            if purpose and purpose[0] == "noise":
                lines = [
                    json.loads(line) for line in (place / "ledger.jsonl").read_text().splitlines()
                ]
                seen.append((sum(line["row"] == "step" for line in lines), len(synced)))
            return normal(self, count, *purpose)

        fsync = os.fsync

        def note(descriptor: int) -> None:
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith("ledger.jsonl"):
                synced.append(descriptor)
            fsync(descriptor)

        with mock.patch.object(kind, "normal", watch), mock.patch.object(os, "fsync", note):
            train_toy(place, source, plan)
        assert [rows for rows, _ in seen] == [1, 2, 3, 4, 5, 6]
        assert [flushed for _, flushed in seen] == [2, 3, 4, 5, 6, 7], "an intent was not flushed"


def a_restart_repeats_or_pays() -> None:
    with folder() as place:
        source, plan = fresh_source(), plan_of()
        straight = train_toy(place, source, plan)
        assert spent(place)["run"].charged_steps == 6
        import shutil

        kept = place / "checkpoints" / "run"
        shutil.rmtree(kept)
        assert torch.equal(train_toy(place, source, plan), straight), (
            "the same run again must be the same"
        )
        assert spent(place)["run"].charged_steps == 6, (
            "a repeated step was charged though its noise is the same"
        )
        shutil.rmtree(kept)
        train_toy(place, source, plan, gradients=lambda rows: toy_gradients(rows, scale=0.01))
        assert spent(place)["run"].charged_steps > 6, "steps on another gradient were not charged"


def a_budget_adds_up_all_runs_and_holds_its_cap() -> None:
    errors, accounting = part("errors"), part("privacy.accounting")
    with folder() as place:
        plan = plan_of(sampling_probability=0.05)
        one = accounting.account(plan).epsilon
        train_toy(place, fresh_source("a"), plan)
        train_toy(place, fresh_source("b"), plan, finish=False)
        budget = part("privacy.ledger").budget_of(place / "ledger.jsonl", None)
        assert [run["finished"] for run in budget["runs"]] == [True, False]
        assert one < budget["epsilon"] < 2 * one + 0.01
        assert abs(budget["epsilon"] - accounting.account(replace(plan, steps=12)).epsilon) < 1e-3
        rows = (place / "ledger.jsonl").read_text()
        try:
            train_toy(place, fresh_source("c"), plan, cap=budget["epsilon"] + 0.01)
        except errors.PrivacyRefused:
            assert (place / "ledger.jsonl").read_text() == rows
        else:
            raise AssertionError("a run passed the cap")


def a_checkpoint_ahead_of_its_ledger_is_charged() -> None:
    """As after an older copy of the ledger was put back."""
    with folder() as place:
        source, plan, path = fresh_source(), plan_of(), place / "ledger.jsonl"
        train_toy(place, source, plan, finish=False)
        path.write_text(
            "".join(path.read_text().splitlines(keepends=True)[:3])
        )  # opened, and two steps
        assert spent(place)["run"].charged_steps == 2
        train_toy(place, source, plan)
        assert spent(place)["run"].charged_steps == 6, (
            "steps that the state has behind it are not in the ledger"
        )


def a_run_keeps_its_plan() -> None:
    with folder() as place:
        source = fresh_source()
        train_toy(place, source, plan_of(), finish=False)
        try:
            train_toy(place, source, plan_of(noise_multiplier=0.3))
        except part("errors").PrivacyRefused:
            return
        raise AssertionError("a run went on with less noise than it had begun with")


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
            raise AssertionError("a step began whose intent is not whole on the disk")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (place / "ledger.jsonl").read_bytes() == before, "half a row was left"


# ----------------------------------------------------------------------------------------------- accounting and claims

GOLDEN = [
    (0.0152, 1973, 0.8, 4.9e-6, 6.99, 7.74),
    (0.0298, 1680, 0.9, 4.7e-5, 9.16, 10.13),
    (0.0939, 1064, 1.5, 7.8e-5, 10.86, 11.93),
    (0.0341, 878, 1.0, 2.6e-6, 7.11, 7.77),
    (1.0, 1, 1.0, 1e-5, 4.377, 4.73),
]
"""q, steps, sigma, delta; epsilon by PLD and by RDP, as computed by three accountants before this package was written."""


def accountants_give_the_known_figures() -> None:
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


def config_of(**privacy: Any) -> Any:
    from post_dist.config.schema import RunConfig

    given = {"enabled": True, "declared_examples": 6000} | privacy
    return RunConfig.model_validate(
        {"name": "a", "privacy": given, "tune": {"batch_size": 60, "steps": 50}}
    )


def calibration_meets_its_target_from_below() -> None:
    accounting = part("privacy.accounting")
    for target in (1.0, 3.0, 8.0):
        plan = accounting.private_plan(config_of(target_epsilon=target))
        epsilon = accounting.account(plan).epsilon
        assert target - 0.02 < epsilon <= target


def the_plan_is_declared_and_never_counted() -> None:
    plan = part("privacy.accounting").private_plan(config_of(noise_multiplier=1.0))
    assert plan.expected_batch_size == 60.0
    assert plan.sampling_probability == 0.01
    assert math.isclose(plan.delta, 6000**-1.1)
    assert plan.delta < 1 / 6000


def seeded_noise_is_not_called_private() -> None:
    ledger, statement = part("privacy.ledger"), part("privacy.statement")
    plan = plan_of(noise_source="seeded", sampling_probability=0.05)
    said = statement.privacy_statement(
        ledger.Spending(plan, "", {(0, step): {"a"} for step in range(6)})
    )
    assert said["private"] is False
    assert said["epsilon"] is None
    assert part("privacy.accounting").composed_epsilon([plan], 1e-5) == math.inf


def statements_hold_what_was_charged() -> None:
    ledger, statement = part("privacy.ledger"), part("privacy.statement")
    plan = plan_of(sampling_probability=0.05)
    once = {(0, step): {"a"} for step in range(6)}
    said = statement.privacy_statement(ledger.Spending(plan, "", once))
    twice = statement.privacy_statement(ledger.Spending(plan, "", once | {(0, 2): {"a", "b"}}))
    assert twice["epsilon"] > said["epsilon"] + 1e-3, (
        "a step that was charged twice is not in the claim"
    )
    assert statement.statement_problems(said) == statement.statement_problems(twice) == []
    worse = {
        "epsilon": 0.5,
        "noise_multiplier": 0.5,
        "steps": 60,
        "sampling_probability": 0.2,
        "steps_repeated": {"2": 5},
    }
    for field, better in worse.items():
        assert statement.statement_problems(said | {field: better}), f"a false {field} was not seen"


def accountants_must_agree() -> None:
    accounting, plan = part("privacy.accounting"), plan_of(sampling_probability=0.02, steps=200)
    losses = accounting._losses
    assert accounting.account.__wrapped__(plan).epsilon > 1
    for factor in (0.8, 1.25):

        def wrong(tried: Any, interval: float, factor: float = factor) -> Any:
            return losses(
                replace(tried, noise_multiplier=factor * tried.noise_multiplier), interval
            )

        with mock.patch.object(accounting, "_losses", wrong):
            try:
                accounting.account.__wrapped__(plan)
            except part("errors").PrivacyRefused:
                continue
        raise AssertionError(f"a loss for {factor} of the noise was believed")


def a_repeated_step_costs_what_its_one_sample_tells() -> None:
    """Against delta by integration: k sums of one sample are a mixture of two normals whose mean has a k-th of the variance."""
    ledger, plan, times = part("privacy.ledger"), plan_of(sampling_probability=0.05, steps=1), 8
    begun = ledger.Spending(plan, "", {(0, 0): {str(number) for number in range(times)}})
    epsilon = part("privacy.accounting").composed_epsilon(begun.plans(), plan.delta)
    deviation = plan.noise_multiplier / times**0.5
    x = np.linspace(-12 * deviation, 1 + 12 * deviation, 1_000_001)
    without, with_one = (
        stats.norm.pdf(x, 0, deviation),
        0.95 * stats.norm.pdf(x, 0, deviation) + 0.05 * stats.norm.pdf(x, 1, deviation),
    )
    delta = np.trapezoid(np.maximum(with_one - math.exp(epsilon) * without, 0), x)
    assert 0.9 * plan.delta < delta <= plan.delta * 1.001, (
        f"epsilon {epsilon} holds at delta {delta}, not {plan.delta}"
    )


def untrusted_statements_are_refused_soon() -> None:
    """What the other side wrote is refused or called false, and never takes long or raises anything else."""
    ledger, statement, errors = part("privacy.ledger"), part("privacy.statement"), part("errors")
    said = statement.privacy_statement(
        ledger.Spending(plan_of(), "", {(0, step): {"a"} for step in range(6)})
    )
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
            assert statement.statement_problems(said | changes), f"{changes} was believed"
        assert time.monotonic() - start < 20, f"{changes} took long"


CHECKS: list[Callable[[], None]] = [
    every_step_is_charged_and_noised_also_when_empty,
    intents_are_on_disk_before_the_noise,
    a_restart_repeats_or_pays,
    a_budget_adds_up_all_runs_and_holds_its_cap,
    a_checkpoint_ahead_of_its_ledger_is_charged,
    a_run_keeps_its_plan,
    a_full_disk_stops_a_step_before_its_noise,
    accountants_give_the_known_figures,
    calibration_meets_its_target_from_below,
    the_plan_is_declared_and_never_counted,
    seeded_noise_is_not_called_private,
    statements_hold_what_was_charged,
    a_repeated_step_costs_what_its_one_sample_tells,
    accountants_must_agree,
    untrusted_statements_are_refused_soon,
]
