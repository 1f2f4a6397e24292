"""The commands for the privacy cost of a run: planned, spent, and audited."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from post_dist import api
from post_dist.commands.options import AsJson, Overrides, RunFile
from post_dist.commands.printing import print_numbers
from post_dist.errors import InputError, PrivacyRefused


def privacy(run: RunFile, set_: Overrides = None, json_: AsJson = False) -> None:
    """Compute epsilon of a plan, or the noise for its target; reads no data and no model."""
    print_numbers(asdict(api.account(api.load_run(run, set_ or ()))), json_)


def budget(
    ledger: Annotated[
        Path, typer.Argument(metavar="LEDGER", help="The ledger of a private data set.")
    ],
    delta: Annotated[
        float | None,
        typer.Option(
            min=0,
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
    json_: AsJson = False,
) -> None:
    """Add up what all runs have spent on a data set, including stopped and discarded runs."""
    from post_dist.privacy.budget import budget_of, change_cap

    if cap is not None:
        change_cap(ledger, cap, delta)
    print_numbers(budget_of(ledger, delta), json_)


def audit(run: RunFile, set_: Overrides = None, json_: AsJson = False) -> None:
    """Measure a lower bound on epsilon with canaries in the real training step."""
    from post_dist.privacy.audit import audit as audit_plan

    result = audit_plan(api.load_run(run, set_ or ()))
    # Print the result in any case. The checks below decide the exit code.
    print_numbers(result, json_)
    if result["epsilon_lower_bound"] > result["epsilon_claimed"]:
        raise PrivacyRefused(
            "the canaries show more than the plan claims",
            "do not use prompts made with this installation",
        )
    # An audit that finds nothing without noise would find nothing with a broken mechanism either.
    if result["epsilon_lower_bound_without_noise"] <= result["epsilon_claimed"]:
        raise InputError(
            "even without noise the canaries show no more than the plan claims",
            "the audit cannot judge so small a plan",
        )
