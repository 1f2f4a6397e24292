"""The ledger of private data: an append-only file with rows for each run and each step.

A row reaches the disk before its step draws noise. So a run that was killed or discarded is charged
for everything that it may have revealed. Each row carries the hash of the row before it, so
accidental changes are detected. Only a changed last row, or rows removed at the end, go unnoticed.

A killed run repeats its last step. If the sum is the same, so is the noise, and no row is added. A
different sum adds a row and is charged again. One run at a time writes to a ledger.
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

# The first row carries this hash, because no row comes before it.
_START = hashlib.sha256(b"post_dist ledger").hexdigest()

# The delta at which the budget of an empty ledger is stated.
_DEFAULT_DELTA = 1e-6


@dataclass
class Spending:
    """Privacy budget that one run has spent.

    Attributes:
        plan: the run's plan.
        opened: time at which the run started, in UTC.
        intents: by (trial, step), the commitments to all sums with which the step was started.
        finished: whether all steps were taken.
    """

    plan: PrivacyPlan
    opened: str
    intents: dict[tuple[int, int], set[str]] = field(default_factory=dict)
    finished: bool = False

    @property
    def charged_steps(self) -> int:
        """Number of charged steps. A step that was started with two sums counts twice."""
        return sum(len(sums) for sums in self.intents.values())

    @property
    def repeated_steps(self) -> dict[int, int]:
        """Repeated steps: number of times a step was started -> number of such steps."""
        return {times: count for times, count in self._begun.items() if times > 1}

    def plans(self) -> list[PrivacyPlan]:
        """Return the spending as plans whose steps were all taken.

        A search is charged in full from its first row.
        """
        return self.plan.spent(self._begun)

    @property
    def _begun(self) -> Counter[int]:
        """Histogram: number of times a step was started -> number of such steps."""
        return Counter(len(sums) for sums in self.intents.values())


def ledger_path(config: RunConfig) -> Path:
    """Return the path of the ledger for the private data of a run file.

    Raises:
        InputError: the data are not in a local file, and `privacy.ledger` is not set.
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

    An incomplete last row is skipped. The run was killed while it wrote the row, so the step had
    drawn no noise.

    Raises:
        InputError: the file cannot be read.
        ArtifactRefused: a row is not a ledger row, or does not follow from the row before it.
    """
    return _spendings(_lines(path), path)


def budget_of(path: Path, delta: float | None) -> dict[str, Any]:
    """Return what the runs of a ledger have spent, each alone and all together.

    Args:
        path: the ledger.
        delta: the delta at which to state epsilon. None takes the smallest delta of the runs.
    """
    # Epsilons at different deltas cannot be compared, so all runs are stated at one delta.
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


class LedgerRun:
    """Writes the spending of one run to a ledger.

    Args:
        path: the ledger.
        descriptor: file descriptor of the open ledger, from `lock_ledger`.
        run: name of this run.
        plan: plan of this run.
        cap: largest epsilon that all runs together may reach; None for no limit.

    Raises:
        ArtifactRefused: the ledger was changed.
        PrivacyRefused: the run would exceed the cap, or it started with another plan.
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
        # The steps so far were charged by the old plan, so the plan cannot change on a restart.
        if own.plan != plan:
            raise PrivacyRefused(
                f"{path} records this run with another privacy plan",
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
        """Spending of this run."""
        return self._spendings[self._run]

    def intend(self, trial: int, step: int, commitment: str) -> None:
        """Write a step's intent to disk, unless the ledger has it for this exact sum.

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
        """Charge the steps before a trial's checkpoint that are missing in the ledger.

        Steps are missing if they were charged to another ledger, or to a newer copy of this one.
        """
        for step in range(steps):
            if (trial, step) not in self.spending.intents:
                self.intend(trial, step, "done before")

    def finish(self) -> None:
        """Record that the run has taken all its steps."""
        if not self.spending.finished:
            self.spending.finished = True
            self._append(row="finished", run=self._run)

    def _check_cap(self, own: Spending) -> None:
        """Check the total epsilon of all runs against the cap, with `own` as this run's spending.

        Raises:
            PrivacyRefused: the total exceeds the cap.
        """
        if self._cap is None:
            return
        # Finished, stopped and discarded runs all count.
        others = []
        for run, spending in self._spendings.items():
            if run != self._run:
                others += spending.plans()
        total = composed_epsilon([*others, *own.plans()], self._plan.delta)
        if total > self._cap:
            raise PrivacyRefused(
                f"this run would raise the epsilon of the data set to {total:.3f} "
                f"(delta {self._plan.delta:.3g}), above its cap of {self._cap:g}",
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
            # On an almost full disk, `write` may write a part of the row without an error.
            if written < len(data):
                os.ftruncate(self._descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # Only now may the caller draw noise.
            os.fsync(self._descriptor)
        self._previous = _digest(line)


@contextmanager
def lock_ledger(path: Path) -> Iterator[int]:
    """Open a ledger for writing and lock out other runs.

    Yields the file descriptor that `LedgerRun` needs.

    Raises:
        InputError: the file cannot be written to.
        PrivacyRefused: another run holds the lock.
        EnvironmentFault: the file system does not support locks.
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
        # Remove an incomplete last row, so that the next row starts on a new line.
        os.ftruncate(descriptor, path.read_bytes().rfind(b"\n") + 1)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    """Lock an open ledger.

    Raises:
        PrivacyRefused: another run holds the lock.
        EnvironmentFault: the file system does not support locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PrivacyRefused(
            f"another run holds the privacy ledger {path}", "wait until it has ended"
        ) from None
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
    # The text after the last line break is empty, or an incomplete row from a killed run.
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
                    f"{path}: row {number} breaks the chain of hashes; the ledger was changed",
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
