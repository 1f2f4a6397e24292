"""What a private data set has spent: an append-only file with a row for each run and each step's intent.

A row reaches the disk before its step draws noise, so a run that was killed or thrown away is charged for what it may have
shown. Each row carries the hash of the one before it, so that a row that is changed or taken out shows. A step that is done
again for the same sum, after a kill, repeats its noise and is one row; for another sum it is another row, and charged again.
One run at a time writes to a ledger.
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

_START = hashlib.sha256(b"post_dist ledger").hexdigest()


@dataclass
class Spending:
    """What one run has spent.

    Attributes:
        plan: the run's.
        opened: when it began, in UTC.
        intents: how often each (trial, step) was begun with another sum.
        finished: whether all its steps were taken.
    """

    plan: PrivacyPlan
    opened: str
    intents: dict[tuple[int, int], set[str]] = field(default_factory=dict)
    finished: bool = False

    @property
    def charged_steps(self) -> int:
        """Steps that count, those that were begun twice included."""
        return sum(map(len, self.intents.values()))

    @property
    def repeated_steps(self) -> dict[int, int]:
        """From how often a step was begun, where that was more than once, to how many such steps there are."""
        return {times: count for times, count in self._begun.items() if times > 1}

    def plans(self) -> list[PrivacyPlan]:
        """The run as plans whose steps were all taken; a search counts whole from its first row."""
        return self.plan.spent(self._begun)

    @property
    def _begun(self) -> Counter[int]:
        return Counter(map(len, self.intents.values()))


def ledger_path(config: RunConfig) -> Path:
    """Where a run file's private data set keeps its ledger.

    Raises:
        InputError: the data are not a local file and no place is given.
    """
    if config.privacy.ledger is not None:
        return config.privacy.ledger
    if config.private_task is None or config.private_task.path is None:
        raise InputError(
            "privacy.ledger is missing: private data that are no local file need one",
            "name a file that stays with the data",
        )
    return config.private_task.path.with_name(f"{config.private_task.path.name}.ledger.jsonl")


def read_ledger(path: Path) -> dict[str, Spending]:
    """The runs of a ledger by their names; a last row that was cut short by a kill had begun nothing and is passed over.

    Raises:
        InputError: it cannot be read.
        ArtifactRefused: a row is not one, or does not follow from the row before it.
    """
    return _spendings(_lines(path), path)


def budget_of(path: Path, delta: float | None) -> dict[str, Any]:
    """What a ledger's runs have spent, each alone and all together.

    Args:
        path: the ledger.
        delta: at which to state epsilon; None takes the least of the runs'.
    """
    spendings = read_ledger(path)
    if delta is None:
        delta = min((spending.plan.delta for spending in spendings.values()), default=1e-6)
    runs = [
        {
            "run": run,
            "opened": spending.opened,
            "finished": spending.finished,
            "steps_charged": spending.charged_steps,
            "steps_repeated": spending.charged_steps - len(spending.intents),
            "steps_planned": spending.plan.steps,
            "noise_multiplier": spending.plan.noise_multiplier,
            "sampling_probability": spending.plan.sampling_probability,
            "search": spending.plan.mean_trials is not None,
            "private": spending.plan.private,
            "epsilon": composed_epsilon(spending.plans(), delta) if spending.plan.private else None,
        }
        for run, spending in spendings.items()
    ]
    total = composed_epsilon(
        [plan for spending in spendings.values() for plan in spending.plans()], delta
    )
    return {
        "ledger": str(path),
        "epsilon": total,
        "delta": delta,
        "private": total < math.inf,
        "runs": runs,
    }


class LedgerRun:
    """What one run writes to a ledger.

    Args:
        path: the ledger.
        descriptor: of its file, from `lock_ledger`.
        run: this run's name.
        plan: this run's plan.
        cap: the epsilon that all runs together may reach, or None.

    Raises:
        ArtifactRefused: the ledger has been changed.
        PrivacyRefused: the run would pass the cap, or has begun with another plan.
    """

    def __init__(
        self, path: Path, descriptor: int, run: str, plan: PrivacyPlan, cap: float | None
    ) -> None:
        self._path, self._descriptor, self._run, self._plan, self._cap = (
            path,
            descriptor,
            run,
            plan,
            cap,
        )
        lines = _lines(path)
        self._previous = _digest(lines[-1]) if lines else _START
        self._spendings = _spendings(lines, path)
        own = self._spendings.get(run) or Spending(
            plan, datetime.now(UTC).isoformat(timespec="seconds")
        )
        if own.plan != plan:
            raise PrivacyRefused(
                f"{path} has this run with another plan than it would go on with",
                "start anew with --resume never",
            )
        self._check_cap(
            replace(
                own, intents={(0, step): {"planned"} for step in range(plan.steps)} | own.intents
            )
        )
        if run not in self._spendings:
            self._append(row="opened", run=run, opened=own.opened, plan=asdict(plan))
            self._spendings[run] = own

    @property
    def spending(self) -> Spending:
        """This run's."""
        return self._spendings[self._run]

    def intend(self, trial: int, step: int, commitment: str) -> None:
        """Put a step's intent on the disk, unless it stands there for this very sum.

        Raises:
            PrivacyRefused: the step would be charged a second time, and that passes the cap.
        """
        known = self.spending.intents.setdefault((trial, step), set())
        if commitment in known:
            return
        known.add(commitment)
        if len(known) > 1:
            self._check_cap(self.spending)
        self._append(row="step", run=self._run, trial=trial, step=step, commitment=commitment)

    def charge_done(self, trial: int, steps: int) -> None:
        """Charge the first steps of a trial, which a checkpoint has behind it, where the ledger does not have them.

        It may be another ledger than the one that they were charged to, or an older copy of it.
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
        if self._cap is None:
            return
        others = [
            plan
            for run, spending in self._spendings.items()
            if run != self._run
            for plan in spending.plans()
        ]
        total = composed_epsilon([*others, *own.plans()], self._plan.delta)
        if total > self._cap:
            raise PrivacyRefused(
                f"this run would take the data set to epsilon {total:.3f} (delta {self._plan.delta:.3g}), past its cap of {self._cap:g}",
                f"see `post-dist budget {self._path}`",
            )

    def _append(self, **row: Any) -> None:
        line = json.dumps({**row, "previous": self._previous})
        data, size = f"{line}\n".encode(), os.fstat(self._descriptor).st_size
        with writing(self._path):
            if os.write(self._descriptor, data) < len(
                data
            ):  # so does a full disk say it, where it has room for a part
                os.ftruncate(self._descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        self._previous = _digest(line)


@contextmanager
def lock_ledger(path: Path) -> Iterator[int]:
    """Open a ledger to write to, alone; gives the file that a `LedgerRun` needs.

    Raises:
        InputError: it cannot be written to.
        PrivacyRefused: another run holds it.
        EnvironmentFault: the file system has no locks.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise InputError(
            f"cannot write the privacy ledger {path}: {error.strerror}",
            "set privacy.ledger to a file that stays",
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrivacyRefused(
                f"another run spends from {path}", "wait until it has ended"
            ) from None
        except OSError as error:
            raise EnvironmentFault(
                f"{path} cannot be locked: {error.strerror}",
                "set privacy.ledger to a file system with locks",
            ) from None
        os.ftruncate(descriptor, path.read_bytes().rfind(b"\n") + 1)
        yield descriptor
    finally:
        os.close(descriptor)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the privacy ledger {path}: {getattr(error, 'strerror', None) or 'not text'}"
        ) from None


def _spendings(lines: list[str], path: Path) -> dict[str, Spending]:
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
            if row["row"] == "opened":
                runs[row["run"]] = Spending(PrivacyPlan(**row["plan"]), row["opened"])
            elif row["row"] == "step":
                runs[row["run"]].intents.setdefault((row["trial"], row["step"]), set()).add(
                    row["commitment"]
                )
            else:
                runs[row["run"]].finished = True
        except (ValueError, KeyError, TypeError):
            raise ArtifactRefused(
                f"{path}: row {number} is no ledger row", "restore the ledger from a copy"
            ) from None
        previous = _digest(line)
    return runs


def _digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()
