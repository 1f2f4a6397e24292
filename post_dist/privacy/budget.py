"""The budget of a data set: what its runs have spent together, and the cap on it."""

import math
from pathlib import Path
from typing import Any

from post_dist.config.privacy import LEAST_DELTA
from post_dist.errors import InputError
from post_dist.paths import kind_of
from post_dist.privacy.accounting import composed_epsilon
from post_dist.privacy.anchor import (
    Anchor,
    claim_anchor,
    default_anchor_folder,
    find_anchor,
    ledger_of_copies,
)
from post_dist.privacy.ledger import ledger_beside, lock_ledger
from post_dist.privacy.spending import (
    Cap,
    DataSpending,
    Spending,
    ledger_lines,
    read_ledger,
    spending_of,
)

# The delta at which the budget of an empty ledger is stated.
_DEFAULT_DELTA = 1e-6


def ledger_for(path: Path, anchors: Path | None = None) -> Path:
    """Return the ledger that is meant: a ledger itself, or that of private data.

    Args:
        path: the ledger, or the data, or a copy of them or a link to them.
        anchors: folder with the anchor of the ledger. None takes that in the owner's home.
    """
    beside = ledger_beside(path)
    if kind_of(beside):
        return beside
    if kind_of(path) != "file":
        return path
    return ledger_of_copies(anchors or default_anchor_folder(), path) or path


def budget_of(path: Path, delta: float | None, anchors: Path | None = None) -> dict[str, Any]:
    """Return what the runs of a ledger have spent, each alone and all together.

    Args:
        path: the ledger.
        delta: the delta at which to state epsilon. None takes that of the cap, or else the smallest
            delta of the runs.
        anchors: folder with the anchor of the ledger. None looks in the owner's home, where there
            need not be one.

    Raises:
        InputError: the file cannot be read, delta is not from 1e-12 to 1, or `anchors` holds no
            anchor of the ledger.
        ArtifactRefused: the ledger was changed.
    """
    # NaN passes the comparisons of the command line.
    if delta is not None and not LEAST_DELTA <= delta <= 1:
        raise InputError(f"--delta must be from {LEAST_DELTA:g} to 1, not {delta:g}")
    # A run may add rows at any time. The ledger, read last, has at least those of its anchor.
    anchor = _anchor(path, anchors)
    lines = ledger_lines(path)
    if anchor is not None:
        anchor.check(lines)
    spending = spending_of(lines, path)
    # Epsilons at different deltas cannot be compared, so all runs are stated at one delta.
    if delta is None:
        delta = _usual_delta(spending)
    runs = [_budget_row(run, alone, delta) for run, alone in spending.runs.items()]
    plans = spending.plans()
    cap = spending.cap
    return {
        "ledger": str(path),
        "epsilon": composed_epsilon(plans, delta),
        "delta": delta,
        "private": all(plan.private for plan in plans),
        "cap": None if cap is None else cap.epsilon,
        "cap_delta": None if cap is None else cap.delta,
        "anchor": None if anchor is None else str(anchor.file),
        "runs": runs,
    }


def change_cap(
    path: Path, epsilon: float, delta: float | None, anchors: Path | None = None
) -> None:
    """Change the cap of a ledger. The change is a row of the ledger.

    Args:
        path: the ledger.
        epsilon: the new limit.
        delta: the delta at which the limit is meant. None keeps the delta of the old one.
        anchors: folder with the anchor of the ledger. None takes that in the owner's home.

    Raises:
        InputError: there is no such ledger, epsilon is no positive number, delta is below 1e-12
            or not below 1, or `anchors` holds no anchor of the ledger.
        PrivacyRefused: a run holds the ledger.
        ArtifactRefused: the ledger was changed.
    """
    if not 0 < epsilon < math.inf:
        raise InputError(f"--cap must be a number above zero, not {epsilon:g}")
    if delta is not None and not LEAST_DELTA <= delta < 1:
        raise InputError(f"--delta must be from {LEAST_DELTA:g} to below 1, not {delta:g}")
    if kind_of(path) != "file":
        raise InputError(f"there is no privacy ledger {path}", "the first private run makes it")
    # A file that is no ledger gets no anchor, and a mistyped folder neither.
    read_ledger(path)
    _anchor(path, anchors)
    anchor = claim_anchor(anchors or default_anchor_folder(), path, (), may_move=False)
    with lock_ledger(anchor) as ledger:
        ledger.set_cap(Cap(epsilon, delta or _usual_delta(ledger.spending)))


def _anchor(ledger: Path, folder: Path | None) -> Anchor | None:
    """Return the anchor of a ledger, if there is one.

    Raises:
        InputError: the given folder does not hold it.
    """
    anchor = find_anchor(folder or default_anchor_folder(), ledger)
    if anchor is None and folder is not None:
        raise InputError(
            f"{folder} holds no anchor of {ledger}",
            "--anchors takes the folder that privacy.ledger_anchors of the run file names",
        )
    return anchor


def _usual_delta(spending: DataSpending) -> float:
    """Return the delta of the cap, or else the smallest delta of the runs."""
    if spending.cap is not None:
        return spending.cap.delta
    deltas = [run.plan.delta for run in spending.runs.values()]
    return min(deltas, default=_DEFAULT_DELTA)


def _budget_row(run: str, spending: Spending, delta: float) -> dict[str, Any]:
    """Return the row of the budget for one run."""
    plan = spending.plan
    epsilon = None
    if plan.private:
        epsilon = composed_epsilon(spending.plans(), delta)
    return {
        "run": run,
        "opened": spending.opened,
        "finished": spending.finished,
        "steps_charged": spending.charged_steps,
        "steps_repeated": spending.charged_steps - len(spending.intents),
        "steps_planned": plan.steps,
        "noise_multiplier": plan.noise_multiplier,
        "sampling_probability": plan.sampling_probability,
        "search": plan.mean_trials is not None,
        "private": plan.private,
        "epsilon": epsilon,
    }
