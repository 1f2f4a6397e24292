"""The ledger of private data: an append-only file with a row for each run and each step.

A row reaches the disk before its step draws noise. So a run that was killed or thrown away is
charged for everything that it may have revealed. Each row carries the hash of the row before it, so
a changed or missing row is detected. A step that is repeated after a kill for the same sum repeats
its noise and has one row. For another sum it gets another row and is charged again. One run at a
time writes to a ledger.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from post_dist.config.schema import RunConfig
from post_dist.errors import ArtifactRefused, EnvironmentFault, InputError, PrivacyRefused
from post_dist.files import writing
from post_dist.privacy.accounting import composed_epsilon
from post_dist.privacy.plan import PrivacyPlan

# Stands in the first row in place of the hash of a row before it.
_START = hashlib.sha256(b"post_dist ledger").hexdigest()

# The delta of the budget of an empty ledger.
_DEFAULT_DELTA = 1e-6


@dataclass
class Spending:
    """What one run has spent.

    Attributes:
        plan: the run's plan.
        opened: when the run started, in UTC.
        intents: for each (trial, step) the commitments to the sums that it was started with.
        finished: whether all steps were taken.
    """

    plan: PrivacyPlan
    opened: str
    intents: dict[tuple[int, int], set[str]] = field(default_factory=dict)
    finished: bool = False

    @property
    def charged_steps(self) -> int:
        """Number of steps that are charged; a step that was started for two sums counts twice."""
        return sum(len(sums) for sums in self.intents.values())

    @property
    def repeated_steps(self) -> dict[int, int]:
        """Repeated steps: number of times a step was started -> number of such steps."""
        return {times: count for times, count in self._begun.items() if times > 1}

    def plans(self) -> list[PrivacyPlan]:
        """Return what was spent as plans whose steps were all taken.

        A search is charged in full from its first row.
        """
        return self.plan.spent(self._begun)

    @property
    def _begun(self) -> Counter[int]:
        """Histogram: number of times a step was started -> number of such steps."""
        return Counter(len(sums) for sums in self.intents.values())


def ledger_path(config: RunConfig) -> Path:
    """Return where the private data of a run file keep their ledger.

    Raises:
        InputError: the data are not a local file, and `privacy.ledger` is not set.
    """
    if config.privacy.ledger is not None:
        return config.privacy.ledger
    if config.private_task is None or config.private_task.path is None:
        raise InputError(
            "privacy.ledger is missing: private data that are not a local file need one",
            "set privacy.ledger to a file that stays with the data",
        )
    # Beside the data, so that all run files for the same data share one ledger.
    data = config.private_task.path
    return data.with_name(f"{data.name}.ledger.jsonl")


def read_ledger(path: Path) -> dict[str, Spending]:
    """Read the runs of a ledger, by their names.

    A last row that a kill cut short started nothing and is skipped.

    Raises:
        InputError: the file cannot be read.
        ArtifactRefused: a row is not a ledger row, or does not follow from the row before it.
    """
    return _spendings(_lines(path), path)


def budget_of(path: Path, delta: float | None) -> dict[str, Any]:
    """Return what the runs of a ledger have spent, one by one and together.

    Args:
        path: the ledger.
        delta: the delta at which to state epsilon. None takes the least delta of the runs.
    """
    # Epsilons add up at one delta only, so all runs are stated at the same.
    spendings = read_ledger(path)
    if delta is None:
        deltas = [spending.plan.delta for spending in spendings.values()]
        delta = min(deltas, default=_DEFAULT_DELTA)
    runs = []
    plans = []
    for run, spending in spendings.items():
        runs.append(_budget_row(run, spending, delta))
        plans += spending.plans()
    total = composed_epsilon(plans, delta)
    return {
        "ledger": str(path),
        "epsilon": total,
        "delta": delta,
        "private": total < math.inf,
        "runs": runs,
    }


def _budget_row(run: str, spending: Spending, delta: float) -> dict[str, Any]:
    """Return what one run has spent, as one row of the budget."""
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


class LedgerRun:
    """Writes what one run spends to a ledger.

    Args:
        path: the ledger.
        descriptor: open file of the ledger, from `lock_ledger`.
        run: name of this run.
        plan: plan of this run.
        cap: the epsilon that all runs together may reach, or None.

    Raises:
        ArtifactRefused: the ledger was changed.
        PrivacyRefused: the run would exceed the cap, or started with another plan.
    """

    def __init__(
        self, path: Path, descriptor: int, run: str, plan: PrivacyPlan, cap: float | None
    ) -> None:
        self._path = path
        self._descriptor = descriptor
        self._run = run
        self._plan = plan
        self._cap = cap
        # The next row carries the hash of the last one.
        lines = _lines(path)
        self._previous = _digest(lines[-1]) if lines else _START
        self._spendings = _spendings(lines, path)
        own = self._spendings.get(run)
        if own is None:
            own = Spending(plan, datetime.now(UTC).isoformat(timespec="seconds"))
        # Less noise or more steps after a restart would not be what the first rows announced.
        if own.plan != plan:
            raise PrivacyRefused(
                f"{path} has this run with another plan than the one it would resume with",
                "start anew with --resume never",
            )
        # The cap is checked for all steps of the plan before the first one is taken.
        planned = {(0, step): {"planned"} for step in range(plan.steps)}
        self._check_cap(replace(own, intents=planned | own.intents))
        # A run that resumes has its row already.
        if run not in self._spendings:
            self._append(row="opened", run=run, opened=own.opened, plan=asdict(plan))
            self._spendings[run] = own

    @property
    def spending(self) -> Spending:
        """What this run has spent."""
        return self._spendings[self._run]

    def intend(self, trial: int, step: int, commitment: str) -> None:
        """Write a step's intent to the disk, unless it is there for this very sum.

        Args:
            trial: number of the trial; 0 without a search.
            step: number of the step.
            commitment: keyed digest of the step's sum.

        Raises:
            PrivacyRefused: the step would be charged a second time, and that would exceed the cap.
        """
        # The same sum gets the same noise, so it reveals nothing new.
        known = self.spending.intents.setdefault((trial, step), set())
        if commitment in known:
            return
        known.add(commitment)
        # The plan's own steps were checked against the cap at the start; repeated ones were not.
        if len(known) > 1:
            self._check_cap(self.spending)
        self._append(row="step", run=self._run, trial=trial, step=step, commitment=commitment)

    def charge_done(self, trial: int, steps: int) -> None:
        """Charge the steps that a trial's checkpoint has taken and that the ledger does not have.

        This happens when the steps were charged to another ledger, or to a newer copy of this one.
        """
        for step in range(steps):
            if (trial, step) not in self.spending.intents:
                self.intend(trial, step, "done before")

    def finish(self) -> None:
        """Note that the run has taken all its steps."""
        if not self.spending.finished:
            self.spending.finished = True
            self._append(row="finished", run=self._run)

    def _check_cap(self, own: Spending) -> None:
        """Check the sum of all runs, with this one as given, against the cap.

        Raises:
            PrivacyRefused: it exceeds the cap.
        """
        if self._cap is None:
            return
        # Finished, stopped and thrown away runs all count.
        others = []
        for run, spending in self._spendings.items():
            if run != self._run:
                others += spending.plans()
        total = composed_epsilon([*others, *own.plans()], self._plan.delta)
        if total > self._cap:
            raise PrivacyRefused(
                f"this run would take the data set to epsilon {total:.3f} "
                f"(delta {self._plan.delta:.3g}), past its cap of {self._cap:g}",
                f"see `post-dist budget {self._path}`",
            )

    def _append(self, **row: Any) -> None:
        """Write a row to the end of the ledger and flush it.

        Raises:
            EnvironmentFault: the disk is full; the ledger is as it was before.
        """
        # One write for the whole row, at the end of the file.
        line = json.dumps({**row, "previous": self._previous})
        data = f"{line}\n".encode()
        size = os.fstat(self._descriptor).st_size
        with writing(self._path):
            written = os.write(self._descriptor, data)
            # A full disk that has room for a part of the row writes that part and raises nothing.
            if written < len(data):
                os.ftruncate(self._descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # Only now may the caller draw noise.
            os.fsync(self._descriptor)
        self._previous = _digest(line)


@contextmanager
def lock_ledger(path: Path) -> Iterator[int]:
    """Open a ledger for writing and keep other runs out.

    Yields the file descriptor that `LedgerRun` needs.

    Raises:
        InputError: the file cannot be written to.
        PrivacyRefused: another run holds it.
        EnvironmentFault: the file system has no locks.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise InputError(
            f"cannot write the privacy ledger {path}: {error.strerror}",
            "set privacy.ledger to a file that stays with the data",
        ) from None
    try:
        _lock(descriptor, path)
        # Remove a last row that a kill cut short, so that the next row has a line of its own.
        os.ftruncate(descriptor, path.read_bytes().rfind(b"\n") + 1)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    """Lock an open ledger.

    Raises:
        PrivacyRefused: another run holds it.
        EnvironmentFault: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PrivacyRefused(f"another run spends from {path}", "wait until it has ended") from None
    except OSError as error:
        raise EnvironmentFault(
            f"{path} cannot be locked: {error.strerror}",
            "set privacy.ledger to a file system with locks",
        ) from None


def _lines(path: Path) -> list[str]:
    """Read the complete lines of a ledger.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise InputError(f"cannot read the privacy ledger {path}: {reason}") from None
    # What follows the last line break is empty, or a row that a kill cut short.
    return text.split("\n")[:-1]


def _spendings(lines: list[str], path: Path) -> dict[str, Spending]:
    """Parse the rows of a ledger and check that each follows from the row before it.

    Raises:
        ArtifactRefused: a row is not a ledger row, or does not follow from the row before it.
    """
    # A changed row breaks the chain of hashes at the row after it.
    runs: dict[str, Spending] = {}
    previous = _START
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if row["previous"] != previous:
                raise ArtifactRefused(
                    f"{path}: row {number} does not follow from the row before it",
                    "restore the ledger from a copy",
                )
            _add_row(runs, row)
        except (ValueError, KeyError, TypeError):
            raise ArtifactRefused(
                f"{path}: row {number} is not a ledger row", "restore the ledger from a copy"
            ) from None
        previous = _digest(line)
    return runs


def _add_row(runs: dict[str, Spending], row: dict[str, Any]) -> None:
    """Add one row of a ledger to the spending of its run."""
    if row["row"] == "opened":
        runs[row["run"]] = Spending(PrivacyPlan(**row["plan"]), row["opened"])
    elif row["row"] == "step":
        place = (row["trial"], row["step"])
        runs[row["run"]].intents.setdefault(place, set()).add(row["commitment"])
    else:
        runs[row["run"]].finished = True


def _digest(line: str) -> str:
    """Return the hash of a row, which the next row carries."""
    return hashlib.sha256(line.encode()).hexdigest()
