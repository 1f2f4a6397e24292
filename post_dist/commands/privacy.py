"""The commands for the privacy cost of a run: planned, spent, and audited."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from post_dist import api
from post_dist.commands.options import (
    AsJson,
    Epsilon,
    Minutes,
    Output,
    Overrides,
    RunFile,
    with_epsilon,
)
from post_dist.commands.printing import print_json, print_numbers, refuse
from post_dist.config.privacy import LEAST_DELTA
from post_dist.config.schema import RunConfig
from post_dist.errors import InputError, PostDistError, PrivacyRefused
from post_dist.runtime.ranks import leave_ranks, this_rank
from post_dist.runtime.stop import listen
from post_dist.runtime.terminal import bar


def privacy(
    run: RunFile,
    set_: Overrides = None,
    output: Output = None,
    epsilon: Epsilon = None,
    minutes: Minutes = None,
    json_: AsJson = False,
) -> None:
    """Compute epsilon of a plan, or the noise for its target. Reads no data.

    It reads no model either, except with --minutes: the student's gradients are then timed.
    """
    overrides = with_epsilon(set_, epsilon)
    chosen = {}
    if minutes is not None:
        listen()
        timed = api.settings_for_minutes(api.load_run(run, overrides, output), minutes)
        overrides += timed.overrides
        chosen = {"gradients_per_second": timed.gradients_per_second, **timed.settings}
    cost = api.account(api.load_run(run, overrides, output))
    if this_rank() == 0:
        print_numbers(chosen | asdict(cost), json_)
    leave_ranks()


def budget(
    ledger: Annotated[
        Path,
        typer.Argument(metavar="LEDGER", help="The ledger of a private data set, or its data."),
    ],
    delta: Annotated[
        float | None,
        typer.Option(
            min=LEAST_DELTA,
            max=1,
            help="Delta of the total; default: the cap's, or the smallest of the runs.",
        ),
    ] = None,
    cap: Annotated[
        float | None,
        typer.Option(
            min=1e-3, max=1e3, help="Change the limit on the total epsilon, stated at --delta."
        ),
    ] = None,
    anchors: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The folder of privacy.ledger_anchors, if the run file sets it."
        ),
    ] = None,
    json_: AsJson = False,
) -> None:
    """Add up what all runs have spent on a data set, including stopped and discarded runs."""
    from post_dist.privacy.budget import budget_of, change_cap, ledger_for

    # The data stand for their ledger.
    ledger = ledger_for(ledger, anchors)
    if cap is not None:
        change_cap(ledger, cap, delta, anchors)
    result = budget_of(ledger, delta, anchors)
    if json_:
        print_json(result)
    else:
        print(*budget_lines(result), sep="\n")


def budget_lines(result: Mapping[str, Any]) -> list[str]:
    """Write a budget as a sentence, and a bar for the epsilon of each run and of all together."""
    from post_dist.artifacts.card import plain

    cap = result["cap"]
    limit = "" if cap is None else f" of {cap:g}"
    end = "; no limit is set." if cap is None else "."
    runs = result["runs"]
    count = "1 run has" if len(runs) == 1 else f"{len(runs)} runs have"
    lines = [
        f"{count} spent epsilon {_epsilon(result)}{limit}, at delta {result['delta']:.3g}{end}",
        "",
    ]
    # Epsilons do not add up: runs together cost less than their sum.
    whole = cap or max(result["epsilon"], 1e-9)
    for run in runs:
        steps = f"{run['steps_charged']} of {run['steps_planned']} steps"
        lines.append(f"{run['run']}  {_bar_of(run, whole)}  {run['opened'][:10]}  {steps}")
    lines.append(f"{'together':<16}  {_bar_of(result, whole)}")
    if result["anchor"] is not None:
        lines.append(f"The anchor {result['anchor']} shows no removed row.")
    # A path may hold characters that steer a terminal.
    return [plain(line) for line in lines]


def _epsilon(entry: Mapping[str, Any]) -> str:
    return f"{entry['epsilon']:.3f}" if _is_bounded(entry) else "infinity"


def _bar_of(entry: Mapping[str, Any], whole: float) -> str:
    share = entry["epsilon"] / whole if _is_bounded(entry) else 1.0
    return f"{bar(share)} {_epsilon(entry):>8}"


def _is_bounded(entry: Mapping[str, Any]) -> bool:
    """Return whether there is an epsilon. An accountant may find none for much spending."""
    return bool(entry["private"] and math.isfinite(entry["epsilon"]))


class Attack(StrEnum):
    """What an audit tries."""

    canaries = "canaries"
    lira = "lira"


def audit(
    run: RunFile,
    set_: Overrides = None,
    output: Output = None,
    attack: Annotated[
        Attack,
        typer.Option(
            help="canaries: a lower bound on epsilon from canaries in the real training step, "
            "without data. lira: membership inference with shadow prompts on the private data."
        ),
    ] = Attack.canaries,
    shadows: Annotated[
        int, typer.Option(min=4, help="lira: number of shadow prompts, an even number.")
    ] = 8,
    rows: Annotated[
        int, typer.Option(min=20, help="lira: number of private rows in the attack.")
    ] = 1000,
    json_: AsJson = False,
) -> None:
    """Attack a plan or its prompts, and print what the attack finds beside the claim."""
    if attack == Attack.lira:
        listen()
        config = api.load_run(run, set_ or (), output)
        result = api.audit_membership(config, shadows=shadows, rows=rows)
        if this_rank() == 0:
            print_numbers(result, json_)
        leave_ranks()
    else:
        _audit_with_canaries(api.load_run(run, set_ or (), output), json_)


def _audit_with_canaries(config: RunConfig, as_json: bool) -> None:
    """Measure a lower bound on epsilon with canaries in the real training step."""
    from post_dist.privacy.audit import audit as audit_plan

    result = audit_plan(config)
    refusal = _refusal(result)
    if refusal is not None:
        refuse(result, refusal, as_json)
    print_numbers(result, as_json)


def _refusal(result: Mapping[str, Any]) -> PostDistError | None:
    """Return the error of an audit that found a fault, or that could not find one."""
    if result["epsilon_lower_bound"] > result["epsilon_claimed"]:
        return PrivacyRefused(
            "the canaries show more than the plan claims",
            "do not use prompts made with this installation",
        )
    # An audit that finds nothing without noise would find nothing with a broken mechanism either.
    if result["epsilon_lower_bound_without_noise"] <= result["epsilon_claimed"]:
        return InputError(
            "even without noise the canaries show no more than the plan claims",
            "the audit cannot judge so small a plan",
        )
    return None
