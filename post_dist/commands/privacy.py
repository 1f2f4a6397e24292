"""What a run costs in privacy: planned, spent, and audited."""

from pathlib import Path
from typing import Annotated

import typer

from post_dist.commands.options import AsJson, Overrides, RunFile
from post_dist.commands.printing import print_numbers
from post_dist.config.load import load_run
from post_dist.errors import InputError, PrivacyRefused


def privacy(run: RunFile, set_: Overrides = None, json_: AsJson = False) -> None:
    """Epsilon of the run file's plan, or the noise for its target; reads no data and no model."""
    from post_dist.privacy.accounting import account, private_plan

    plan = private_plan(load_run(run, set_, None))
    cost = account(plan)
    print_numbers(
        {
            "epsilon": cost.epsilon,
            "delta": plan.delta,
            "noise_multiplier": plan.noise_multiplier,
            "sampling_probability": plan.sampling_probability,
            "steps": plan.steps,
            "accountant": cost.accountant,
            "cross_checks": cost.cross_checks,
            "epsilon_at_delta": cost.epsilon_at,
            "true_positive_rate_at_1_percent_false": cost.true_positive_rate,
            "mean_trials": plan.mean_trials,
            "private": plan.private,
        },
        json_,
    )


def budget(
    ledger: Annotated[
        Path, typer.Argument(metavar="LEDGER", help="The ledger of a private data set.")
    ],
    delta: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="At which delta; default the least of the runs'."),
    ] = None,
    json_: AsJson = False,
) -> None:
    """What a private data set has spent over all private runs: finished, stopped and thrown away."""
    from post_dist.privacy.ledger import budget_of

    print_numbers(budget_of(ledger, delta), json_)


def audit(run: RunFile, set_: Overrides = None, json_: AsJson = False) -> None:
    """An empirical lower bound on epsilon from canaries in the real training step, beside the claim; reads no data and no model."""
    from post_dist.privacy.audit import audit as audit_plan

    result = audit_plan(load_run(run, set_, None))
    print_numbers(result, json_)
    if result["epsilon_lower_bound"] > result["epsilon_claimed"]:
        raise PrivacyRefused(
            "the canaries show more than the plan claims",
            "do not use prompts made with this installation",
        )
    if result["epsilon_lower_bound_without_noise"] <= result["epsilon_claimed"]:
        raise InputError(
            "even without noise the canaries show no more than the plan claims",
            "the audit says nothing of so small a plan",
        )
