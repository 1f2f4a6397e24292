"""What the runs on a data set have spent, read from the rows of its ledger."""

import errno
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from post_dist.config.privacy import LEAST_DELTA
from post_dist.errors import ArtifactRefused, InputError
from post_dist.privacy.plan import PrivacyPlan

_MOST_BYTES = 1 << 30
"""Size of a ledger of about 4 million steps."""
_RUN = re.compile(r"[0-9A-Za-z_-]{1,64}")
"""Name of a run."""
_ROW_START = '{"row": "'
"""Every row begins with its kind."""

NO_ROW = hashlib.sha256(b"post_dist ledger").hexdigest()
"""The hash that the first row carries, because no row comes before it."""
NO_FIRST_ROW = ""
"""What an anchor holds for the hash of the first row while its ledger has no row."""


@dataclass(frozen=True)
class Cap:
    """Limit on what all runs on a data set may spend together.

    Attributes:
        epsilon: the limit; None for no limit.
        delta: the delta at which the total epsilon is stated.
    """

    epsilon: float | None
    delta: float


@dataclass
class Spending:
    """Privacy budget that one run has spent.

    Attributes:
        plan: the run's plan.
        opened: time at which the run started, in UTC.
        intents: by (trial, step), the commitments to all sums with which the step was started.
        scores: by trial, the commitments to all noisy counts of right examples that were released.
        finished: whether all steps were taken.
    """

    plan: PrivacyPlan
    opened: str
    intents: dict[tuple[int, int], set[str]] = field(default_factory=dict)
    scores: dict[int, set[str]] = field(default_factory=dict)
    finished: bool = False

    @property
    def charged_steps(self) -> int:
        """Number of charged steps. A step that was started with two sums counts twice."""
        return sum(len(sums) for sums in self.intents.values())

    @property
    def repeated_steps(self) -> dict[int, int]:
        """Repeated steps: number of times a step was started -> number of such steps."""
        return {times: count for times, count in self._begun.items() if times > 1}

    @property
    def is_as_planned(self) -> bool:
        """Whether no step was taken and no count released twice with different values."""
        return not self.repeated_steps and max(self._released, default=0) <= 1

    def plans(self) -> list[PrivacyPlan]:
        """Return the spending as plans whose steps were all taken.

        A search is charged in full from its first row.
        """
        return self.plan.spent(self._begun, self._released)

    def at_the_end(self) -> "Spending":
        """Return what the run will have spent when all steps of its plan were taken."""
        planned = {(0, step): {"planned"} for step in range(self.plan.steps)}
        return replace(self, intents=planned | self.intents)

    @property
    def _begun(self) -> Counter[int]:
        """Histogram: number of times a step was started -> number of such steps."""
        return Counter(len(sums) for sums in self.intents.values())

    @property
    def _released(self) -> Counter[int]:
        """Histogram: number of counts of a trial that were released -> number of such trials."""
        return Counter(len(counts) for counts in self.scores.values())


@dataclass
class DataSpending:
    """Privacy budget that all runs on a data set have spent.

    Attributes:
        runs: the spending of each run, by the run's name.
        cap: the limit for all runs together; None in a ledger of version 0.1.0, which has none.
    """

    runs: dict[str, Spending] = field(default_factory=dict)
    cap: Cap | None = None

    def plans(self, without: str | None = None) -> list[PrivacyPlan]:
        """Return the spending of all runs, but for one, as plans whose steps were all taken."""
        # Finished, stopped and discarded runs all count.
        plans = []
        for run, spending in self.runs.items():
            if run != without:
                plans += spending.plans()
        return plans

    def add(self, row: dict[str, Any]) -> None:
        """Add one row of a ledger.

        Raises:
            KeyError, TypeError, ValueError: it is not a row, or may not stand here.
        """
        kind = row["row"]
        if kind == "cap":
            self.cap = _cap(row)
        elif kind == "opened":
            # A second row would hide what the run has spent since its first one.
            if row["run"] in self.runs:
                raise ValueError(row["run"])
            plan = PrivacyPlan(**row["plan"])
            if plan.out_of_bounds():
                raise ValueError(row["run"])
            # The name is printed.
            if not _RUN.fullmatch(row["run"]):
                raise ValueError(row["run"])
            self.runs[row["run"]] = Spending(plan, _time(row["opened"]))
        elif kind == "step":
            place = (int(row["trial"]), int(row["step"]))
            self.runs[row["run"]].intents.setdefault(place, set()).add(str(row["commitment"]))
        elif kind == "score":
            scores = self.runs[row["run"]].scores
            scores.setdefault(int(row["trial"]), set()).add(str(row["commitment"]))
        elif kind == "finished":
            self.runs[row["run"]].finished = True
        else:
            raise ValueError(kind)


def _time(text: str) -> str:
    """Return a time as `isoformat` writes it, such as 2026-11-28T07:56:19+00:00.

    Raises:
        TypeError, ValueError: it is none.
    """
    # The parser takes any character between the date and the time.
    if datetime.fromisoformat(text).isoformat() != text:
        raise ValueError(text)
    return text


def _cap(row: dict[str, Any]) -> Cap:
    epsilon = row["epsilon"]
    cap = Cap(None if epsilon is None else float(epsilon), float(row["delta"]))
    if not LEAST_DELTA <= cap.delta < 1 or not (cap.epsilon is None or cap.epsilon > 0):
        raise ValueError(row)
    return cap


def read_ledger(path: Path) -> DataSpending:
    """Read a ledger.

    An incomplete last row is skipped. The run was killed while it wrote the row, so the step had
    drawn no noise.

    Raises:
        InputError: the file cannot be read.
        ArtifactRefused: a row is not a ledger row, or does not follow from the row before it.
    """
    return spending_of(ledger_lines(path), path)


def ledger_lines(path: Path) -> list[str]:
    """Read the complete lines of a ledger. A last row that only lacks its line break counts.

    Raises:
        InputError: the file cannot be read.
        ArtifactRefused: it does not begin like a ledger.
    """
    try:
        # A pipe would make the reader wait for ever.
        if path.exists() and not (path.is_file() and path.stat().st_size <= _MOST_BYTES):
            raise OSError(errno.EFBIG, "no regular file of at most 1 GiB")
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        hint = "the first private run writes it beside the data, as DATA.ledger.jsonl"
        if isinstance(error, PermissionError):
            hint = "get access to read and write it: it counts what the data have spent"
        raise InputError(f"cannot read the privacy ledger {path}: {reason}", hint) from None
    # The text after the last line break is empty, or an incomplete row from a killed run, or a row
    # whose line break an editor has removed.
    *lines, last = text.split("\n")
    if is_whole_row(last):
        return [*lines, last]
    # Without a whole line, nothing else shows that this is a ledger.
    if not lines and not _ROW_START.startswith(last[: len(_ROW_START)]):
        raise ArtifactRefused(f"{path} is not a privacy ledger", "give the path of the ledger")
    return lines


def is_whole_row(line: str) -> bool:
    """Return whether a line is a row from its first to its last character."""
    # No part of a JSON object is one.
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def spending_of(lines: Sequence[str], path: Path) -> DataSpending:
    """Add up the lines of a ledger, and check that each follows from the line before it.

    Raises:
        ArtifactRefused: a row is not a ledger row, or does not follow from the row before it.
    """
    # A changed row breaks the chain of hashes at the row after it.
    spending = DataSpending()
    previous = NO_ROW
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if row["previous"] != previous:
                raise ArtifactRefused(
                    f"{path}: row {number} breaks the chain of hashes; the ledger was changed",
                    "restore the ledger from a copy",
                )
            spending.add(row)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise ArtifactRefused(
                f"{path}: row {number} is not a ledger row",
                "give a ledger, or restore this one from a copy",
            ) from None
        previous = row_hash(line)
    return spending


def row_hash(line: str) -> str:
    """Return the hash of a row, which the next row carries."""
    return hashlib.sha256(line.encode()).hexdigest()
