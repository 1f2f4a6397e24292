"""The ledger of private data: an append-only file with rows for each run and each step.

A row reaches the disk before its step draws noise. So a run that was killed or discarded is charged
for everything that it may have revealed. Each row carries the hash of the row before it, and the
ledger's anchor remembers the last one, so changes are detected.

A killed run repeats its last step. If the sum is the same, so is the noise, and no row is added. A
different sum adds a row and is charged again. One run at a time writes to a ledger.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from post_dist.config.schema import RunConfig
from post_dist.errors import EnvironmentFault, InputError, PrivacyRefused, command_line
from post_dist.files import check_write_access, writing
from post_dist.privacy.accounting import composed_epsilon
from post_dist.privacy.anchor import (
    Anchor,
    anchor_folder,
    check_anchors_writable,
    claim_anchor,
    data_marks,
    expected_anchor,
    knows_ledger_and_place,
)
from post_dist.privacy.plan import PrivacyPlan
from post_dist.privacy.spending import (
    NO_FIRST_ROW,
    NO_ROW,
    Cap,
    DataSpending,
    Spending,
    is_whole_row,
    ledger_lines,
    row_hash,
    spending_of,
)


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
    return ledger_beside(config.private_task.path)


def ledger_beside(data: Path) -> Path:
    """Return where the ledger of a file of private data is, unless `privacy.ledger` is set."""
    return data.with_name(f"{data.name}.ledger.jsonl")


def claim_anchor_for(config: RunConfig, *, write: bool = True) -> Anchor:
    """Claim the anchor of the ledger for the private data of a run file, and return it.

    Args:
        config: the run file.
        write: whether the claim is written; otherwise it is only checked.

    Raises:
        InputError: there is no place for the ledger or its anchor.
        PrivacyRefused: the data have another ledger, or two, or theirs is missing.
    """
    folder = anchor_folder(config)
    ledger = ledger_path(config)
    task = config.private_task
    marks = data_marks(task)
    may_move = config.privacy.ledger is None
    anchor = expected_anchor(folder, ledger, marks, may_move=may_move)
    # Of data that have spent from two ledgers, the run file may choose one.
    is_chosen = not may_move and anchor.record.rows > 0 and anchor.record.knows_any(marks)
    if task is not None and task.path is not None and not is_chosen:
        _check_none_beside(task.path, anchor)
    if not write:
        return anchor
    return claim_anchor(folder, ledger, marks, may_move=may_move)


def _check_none_beside(data: Path, anchor: Anchor) -> None:
    """Refuse to spend from one ledger while another one with rows is beside the data.

    Another account may have written it, and the anchors of this one do not know it.

    Args:
        data: the file of private data.
        anchor: the anchor of the ledger that the run would spend from.

    Raises:
        PrivacyRefused: there is such a ledger.
    """
    beside = ledger_beside(data).resolve()
    is_other = beside != anchor.ledger and beside.is_file() and beside.stat().st_size > 0
    # `claim_anchor` judges what this account has spent from both.
    is_known = knows_ledger_and_place(anchor.file.parent, beside, data)
    if not is_other or is_known or anchor.is_copied_to(beside):
        return
    if anchor.record.rows:
        raise PrivacyRefused(
            f"these data have their privacy ledger at {anchor.ledger}, and others have spent "
            f"from {beside}: of examples that are in both, epsilon adds up",
            "if no example is in both, set privacy.ledger to the first; else give the data a "
            "place of their own",
        )
    raise PrivacyRefused(
        f"these data have their privacy ledger at {beside}, not at {anchor.ledger}",
        "set privacy.ledger to that file, or remove the setting; if you may not write it, get "
        "write access",
    )


def check_spending(config: RunConfig, plan: PrivacyPlan | None) -> None:
    """Refuse what tuning would refuse of the ledger of its data. Nothing is written.

    Args:
        config: the run file.
        plan: plan of a run that is to begin; None to leave the cap unchecked.

    Raises:
        InputError: the ledger or its anchor cannot be written to.
        PrivacyRefused: the data have another ledger, or the run would exceed the cap.
        ArtifactRefused: the ledger was changed.
    """
    anchor = claim_anchor_for(config, write=False)
    path = anchor.ledger
    try:
        _check_is_file(path)
        # Tuning makes the ledger, and no folder for it.
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        check_write_access(path)
    except OSError as error:
        raise _unwritable(path, error) from None
    check_anchors_writable(anchor.file.parent)
    lines = ledger_lines(path) if path.exists() else []
    anchor.check(lines)
    spending = spending_of(lines, path)
    if plan is not None:
        cap_of_run(path, spending, "", plan, config.privacy.max_total_epsilon)


class OpenLedger:
    """A ledger that this process alone writes to.

    Args:
        descriptor: its file descriptor, opened to append and locked.
        anchor: its anchor.

    Attributes:
        path: its path.
        spending: what all runs have spent, with every row that was added.

    Raises:
        ArtifactRefused: the ledger was changed, or the file is no ledger. It stays as it is.
    """

    def __init__(self, descriptor: int, anchor: Anchor) -> None:
        self.path = anchor.ledger
        self._descriptor = descriptor
        self._anchor = anchor
        lines = ledger_lines(self.path)
        anchor.check(lines)
        self.spending = spending_of(lines, self.path)
        # The next row carries the hash of the last one.
        self._rows = len(lines)
        self._first = row_hash(lines[0]) if lines else NO_FIRST_ROW
        self._last = row_hash(lines[-1]) if lines else NO_ROW
        self._end_last_row()
        self._size = os.fstat(descriptor).st_size

    def append(self, **row: Any) -> None:
        """Write a row to the end of the ledger, flush it, and remember it in the anchor.

        Raises:
            EnvironmentFault: the disk is full; the ledger is as it was before.
            PrivacyRefused: the file is not the one that this process has locked and written.
        """
        self._check_is_ours()
        # One write for the whole row, at the end of the file.
        line = json.dumps({**row, "previous": self._last}, allow_nan=False)
        data = f"{line}\n".encode()
        with writing(self.path):
            written = os.write(self._descriptor, data)
            # On an almost full disk, `write` may write a part of the row without an error.
            if written < len(data):
                os.ftruncate(self._descriptor, self._size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        self._size += len(data)
        self._rows += 1
        self._last = row_hash(line)
        if self._first == NO_FIRST_ROW:
            self._first = self._last
        # After the row, because an anchor that is ahead of its ledger would refuse it.
        self._anchor.advance(self._rows, self._first, self._last)
        self.spending.add(row)

    def set_cap(self, cap: Cap) -> None:
        """Record a cap, which holds for all later steps of all runs."""
        self.append(row="cap", epsilon=cap.epsilon, delta=cap.delta, set=_now())

    def _check_is_ours(self) -> None:
        """Check that the path still leads to the locked file, and that nobody else has written it.

        An editor or a synchronizing program saves a file by putting another one in its place. Rows
        would then go to a file without a name, and another run could lock the new one.

        Raises:
            PrivacyRefused: it was replaced, or written by a process that does not see our lock.
        """
        locked = os.fstat(self._descriptor)
        try:
            replaced = not os.path.samestat(locked, self.path.stat())
        except OSError:
            replaced = True
        if replaced or locked.st_size != self._size:
            raise PrivacyRefused(
                f"the privacy ledger {self.path} was replaced or changed by another program",
                "restore all its rows, and run the same command again to resume",
            )

    def _end_last_row(self) -> None:
        """Remove an incomplete last row, or end a whole one, so that the next has its own line."""
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        last = data[end:]
        if is_whole_row(last.decode()):
            os.write(self._descriptor, b"\n")
        else:
            os.ftruncate(self._descriptor, end)


class LedgerRun:
    """Writes the spending of one run to a ledger.

    Args:
        ledger: the ledger, from `lock_ledger`.
        run: name of this run.
        plan: plan of this run.
        cap: the run file's limit for all runs together; None if it has none.

    Raises:
        PrivacyRefused: the run would exceed the cap, or it started with another plan.
    """

    def __init__(self, ledger: OpenLedger, run: str, plan: PrivacyPlan, cap: float | None) -> None:
        self._ledger = ledger
        self._run = run
        self._cap = cap_of_run(ledger.path, ledger.spending, run, plan, cap)
        # The cap stands in the first row, so that it is older than anything that was spent.
        if ledger.spending.cap != self._cap:
            ledger.set_cap(self._cap)
        # A run that resumes has its row already.
        if run not in ledger.spending.runs:
            ledger.append(row="opened", run=run, opened=_now(), plan=asdict(plan))

    @property
    def spending(self) -> Spending:
        """Spending of this run."""
        return self._ledger.spending.runs[self._run]

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
        known = self.spending.intents.get((trial, step), set())
        if commitment in known:
            return
        # The plan's own steps were checked against the cap at the start; repeated ones were not.
        if known:
            intents = {**self.spending.intents, (trial, step): known | {commitment}}
            self._check_cap(replace(self.spending, intents=intents))
        self._ledger.append(
            row="step", run=self._run, trial=trial, step=step, commitment=commitment
        )

    def intend_score(self, trial: int, commitment: str) -> None:
        """Write to disk that a count of right examples is released, unless the ledger has it.

        The plan pays for one count of each trial. Another one would be charged on top.

        Args:
            trial: number of the trial; 0 without a search.
            commitment: keyed digest of the count.

        Raises:
            PrivacyRefused: a second count would exceed the cap.
        """
        released = self.spending.scores.get(trial, set())
        if commitment in released:
            return
        if released:
            scores = {**self.spending.scores, trial: released | {commitment}}
            self._check_cap(replace(self.spending, scores=scores))
        self._ledger.append(row="score", run=self._run, trial=trial, commitment=commitment)

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
            self._ledger.append(row="finished", run=self._run)

    def _check_cap(self, own: Spending) -> None:
        """Check what the data will have cost when this run ends.

        Args:
            own: what this run has spent.

        Raises:
            PrivacyRefused: the total exceeds the cap.
        """
        _check_below(self._cap, self._ledger.path, self._ledger.spending, self._run, own)


def cap_of_run(
    path: Path, spending: DataSpending, run: str, plan: PrivacyPlan, cap: float | None
) -> Cap:
    """Return the cap under which a run starts or goes on. Nothing is written.

    Args:
        path: the ledger.
        spending: what it says.
        run: name of the run.
        plan: plan of the run.
        cap: the run file's limit for all runs together; None if it has none.

    Raises:
        PrivacyRefused: the run would exceed the cap, or it started with another plan.
    """
    agreed = _agreed_cap(path, spending.cap, plan, cap)
    own = spending.runs.get(run) or Spending(plan, _now())
    # The steps so far were charged by the old plan, so the plan cannot change on a restart.
    if own.plan != plan:
        raise PrivacyRefused(
            f"{path} records this run with another privacy plan",
            "run `post-dist tune` with --resume never; the ledger keeps what this run has spent",
        )
    # One example more can move a user's clipped sum by 2 C, so the two costs do not add up.
    others = {other.plan.unit for other in spending.runs.values()}
    if others - {plan.unit}:
        raise PrivacyRefused(
            f"{path} counts what runs reveal of {', '.join(sorted(others))}, "
            f"and this run protects {plan.unit}",
            "keep to one setting of private_task.user_column for these data",
        )
    # A run is admitted only if all its steps fit below the cap.
    _check_below(agreed, path, spending, run, own)
    return agreed


def _check_below(cap: Cap, path: Path, spending: DataSpending, run: str, own: Spending) -> None:
    """Refuse a run with which the data will have cost more than their cap.

    Args:
        cap: the cap.
        path: the ledger.
        spending: what it says.
        run: name of the run.
        own: what the run has spent.

    Raises:
        PrivacyRefused: the total exceeds the cap.
    """
    if cap.epsilon is None:
        return
    others = spending.plans(without=run)
    plans = [*others, *own.at_the_end().plans()]
    total = composed_epsilon(plans, cap.delta)
    if total > cap.epsilon:
        raise PrivacyRefused(
            f"this run would raise the epsilon of the data set to {total:.3f} "
            f"(delta {cap.delta:.3g}), above its cap of {cap.epsilon:g}",
            f"see `{command_line('post-dist', 'budget', path)}`",
        )


def _agreed_cap(path: Path, recorded: Cap | None, plan: PrivacyPlan, cap: float | None) -> Cap:
    """Return the cap of a ledger, which a run file may set once.

    Args:
        path: the ledger.
        recorded: its cap; None if it has none yet.
        plan: plan of the run.
        cap: the run file's limit.

    Raises:
        PrivacyRefused: the run file has another cap than the ledger.
    """
    # A ledger without a limit may get one from a run file, because that only forbids more.
    if recorded is None or (recorded.epsilon is None and cap is not None):
        return Cap(cap, plan.delta)
    if cap is not None and cap != recorded.epsilon:
        command = command_line("post-dist", "budget", path, "--cap", f"{cap:g}")
        raise PrivacyRefused(
            f"{path} caps epsilon at {recorded.epsilon:g} (delta {recorded.delta:.3g}), "
            f"but privacy.max_total_epsilon is {cap:g}",
            f"change the setting, or the cap: `{command}`",
        )
    return recorded


@contextmanager
def lock_ledger(anchor: Anchor) -> Iterator[OpenLedger]:
    """Open a ledger for writing and lock out other runs.

    Raises:
        InputError: the file cannot be written to, or is no regular file.
        PrivacyRefused: another run holds the lock.
        ArtifactRefused: the ledger was changed.
        EnvironmentFault: the file system does not support locks.
    """
    path = anchor.ledger
    try:
        _check_is_file(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        _lock(descriptor, path)
        # Another run may have ended since the anchor was read.
        anchor.read_again()
        yield OpenLedger(descriptor, anchor)
    finally:
        os.close(descriptor)


def _check_is_file(path: Path) -> None:
    """Refuse a device such as /dev/null, which would keep no row.

    Raises:
        OSError: it is no regular file.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file")


def _unwritable(path: Path, error: OSError) -> InputError:
    """Say what to do about a ledger that cannot be written to."""
    hint = "set privacy.ledger to a file that stays with the data"
    # With another ledger, the data would forget what they have spent.
    if os.path.isfile(path):
        hint = "get write access: it counts what the data have spent, and no other ledger may"
    return InputError(f"cannot write the privacy ledger {path}: {error.strerror}", hint)


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


def _now() -> str:
    """Return the time in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
