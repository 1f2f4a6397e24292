"""The anchor of a ledger: what the ledger must hold, remembered outside it.

The chain of hashes in a ledger shows a changed row. It does not show rows that were removed at the
end, an emptied file, or a chain that was computed anew. So the number of rows and the hash of the
last one are also kept in a folder of the owner's home. The anchor also knows the data by their
contents and by their place. So copies and links of a file share one ledger, and so do the versions
of a file that is edited.

Not noticed: a change of both the ledger and the anchor, the last row alone if the machine lost
power between the two writes, and other contents at another place, such as a copy with one more
example.
"""

import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from post_dist.artifacts.strict_json import read_dataclass
from post_dist.config.schema import RunConfig
from post_dist.config.sources import Task
from post_dist.errors import ArtifactRefused, InputError, PostDistError, PrivacyRefused
from post_dist.files import check_write_access, file_digest, write_file
from post_dist.paths import kind_of, reading
from post_dist.privacy.spending import NO_FIRST_ROW, NO_ROW, ledger_lines, row_hash
from post_dist.runtime.private_process import owner_only

log = logging.getLogger(__name__)

_LOCK = "lock"
_MOST_BYTES = 16 << 20
"""Size of an anchor that knows about 200,000 versions of the data."""


@dataclass(frozen=True)
class AnchorRecord:
    """The contents of an anchor.

    Attributes:
        ledger: path of the ledger.
        rows: number of rows that the ledger had at least.
        first: hash of the first row, which tells a moved ledger from another one.
        last: hash of row number `rows`.
        salt: random, so that equal data have other digests in other anchors.
        data: salted digests of the marks of the data that the ledger belongs to.
    """

    ledger: str
    rows: Annotated[int, Field(ge=0)]
    first: str
    last: str
    salt: str
    data: tuple[str, ...]

    def knows(self, mark: str) -> bool:
        """Return whether data with this mark belong to the ledger."""
        return self._salted(mark) in self.data

    def knows_any(self, marks: Iterable[str]) -> bool:
        """Return whether data with one of these marks belong to the ledger."""
        return any(map(self.knows, marks))

    def with_data(self, marks: Iterable[str]) -> "AnchorRecord":
        """Return the record, with the marks of data added."""
        return self._with_salted(map(self._salted, marks))

    def without_data(self, marks: Iterable[str]) -> "AnchorRecord":
        """Return the record, without the marks of data that belong to another ledger."""
        removed = set(map(self._salted, marks))
        return replace(self, data=tuple(each for each in self.data if each not in removed))

    def with_data_of(self, other: "AnchorRecord") -> "AnchorRecord":
        """Return the record, with the data of another record with the same salt."""
        return self._with_salted(other.data)

    def _with_salted(self, added: Iterable[str]) -> "AnchorRecord":
        # A dictionary keeps the order, and each key once.
        return replace(self, data=tuple(dict.fromkeys((*self.data, *added))))

    def _salted(self, mark: str) -> str:
        # A plain digest would confirm a guess of the data to whoever reads the anchor.
        return hmac.new(self.salt.encode(), mark.encode(), hashlib.sha256).hexdigest()


class Anchor:
    """The anchor of one ledger.

    Args:
        file: its file.
        record: the contents of the file.
    """

    def __init__(self, file: Path, record: AnchorRecord) -> None:
        self.file = file
        self.record = record

    @property
    def ledger(self) -> Path:
        """Path of the ledger."""
        return Path(self.record.ledger)

    def check(self, lines: Sequence[str]) -> None:
        """Check that a ledger still begins with all rows that it had.

        Args:
            lines: the complete lines of the ledger.

        Raises:
            ArtifactRefused: rows are missing or were changed.
        """
        rows = self.record.rows
        if rows == 0:
            return
        if len(lines) < rows or row_hash(lines[rows - 1]) != self.record.last:
            raise ArtifactRefused(
                f"{self.ledger} had {rows} rows, and they are no longer all there: it was cut or "
                "changed, or it is an older copy",
                f"restore the ledger; to forget what was spent, delete {self.file} as well",
            )

    def is_copied_to(self, other: Path) -> bool:
        """Return whether a file begins like the ledger, which this owner has spent from."""
        if not self.record.rows:
            return False
        try:
            return _first_row(other) == self.record.first
        except PostDistError:  # somebody else's, or no ledger
            return False

    def advance(self, rows: int, first: str, last: str) -> None:
        """Remember the rows of the ledger.

        Args:
            rows: number of rows.
            first: hash of the first row.
            last: hash of the last row.
        """
        # Between reading and writing, no other run may add its data.
        with _locked(self.file.parent):
            self.read_again()
            self.write(replace(self.record, rows=rows, first=first, last=last))

    def read_again(self) -> None:
        """Take over what other runs have written to the file since it was read."""
        if self.file.exists():
            self.record = _read_record(self.file).with_data_of(self.record)

    def write(self, record: AnchorRecord) -> None:
        """Replace the contents of the anchor."""
        text = json.dumps(asdict(record))
        with owner_only():
            write_file(self.file, lambda partial: partial.write_text(text))
        self.record = record


def data_marks(task: Task | None) -> tuple[str, ...]:
    """Return what private data are known by: the digest of a file, and its place.

    The place of a hub data set is its name. Its revisions and splits may share examples.
    """
    if task is None:
        return ()
    if task.path is None:
        return (f"hub {task.hub} {task.hub_config}",)
    return file_marks(task.path)


def file_marks(data: Path) -> tuple[str, ...]:
    """Return what a file of private data is known by."""
    return (file_digest(data), _place_mark(data))


def _place_mark(data: Path) -> str:
    return f"file {data.resolve()}"


def anchor_folder(config: RunConfig) -> Path:
    """Return the folder of the anchors: that of the run file, or one in the owner's home."""
    return config.privacy.ledger_anchors or default_anchor_folder()


def default_anchor_folder() -> Path:
    """Return `post_dist/ledgers` in the folder for state of the XDG base directories."""
    around = Path(os.environ.get("XDG_STATE_HOME", ""))
    # A relative path is void by the specification. It would lead to another folder each time.
    if not around.is_absolute():
        with suppress(RuntimeError):  # no home folder is known
            around = Path.home() / ".local" / "state"
    if not around.is_absolute():
        raise InputError(
            "this account has no home folder for the anchors of ledgers",
            "set privacy.ledger_anchors to a folder that stays with the owner",
        )
    return around / "post_dist" / "ledgers"


def claim_anchor(folder: Path, ledger: Path, marks: Sequence[str], *, may_move: bool) -> Anchor:
    """Write which ledger belongs to these data, and return its anchor.

    The anchor is new if neither the ledger nor the data are known. Other anchors lose the data.

    Args:
        folder: the folder of the anchors.
        ledger: where the run file expects the ledger.
        marks: what the data are known by (`data_marks`).
        may_move: whether the ledger of known data is used wherever it is.

    Raises:
        PrivacyRefused: the data have another ledger, or two, or theirs is missing.
        InputError: the folder cannot be written to.
    """
    ledger = ledger.resolve()
    with owner_only(), _locked(folder):
        anchors = _anchors(folder)
        anchor = _chosen(anchors, folder, ledger, marks, may_move=may_move)
        record = _placed(anchor, ledger, may_move=may_move)
        if record.ledger != str(ledger):
            log.info("tune: the privacy ledger of these data is %s", record.ledger)
        anchor.write(record.with_data(marks))
        # What the data are known by leads to one ledger, now and later.
        for other in anchors:
            if other is not anchor and other.record.knows_any(marks):
                other.write(other.record.without_data(marks))
    return anchor


def expected_anchor(folder: Path, ledger: Path, marks: Sequence[str], *, may_move: bool) -> Anchor:
    """Return the anchor that `claim_anchor` would, and refuse what it refuses. Nothing is written.

    Args:
        folder: the folder of the anchors, which may be missing.
        ledger: where the run file expects the ledger.
        marks: what the data are known by (`data_marks`).
        may_move: whether the ledger of known data is used wherever it is.

    Raises:
        PrivacyRefused: the data have another ledger, or two, or theirs is missing.
    """
    ledger = ledger.resolve()
    anchor = _chosen(_anchors(folder), folder, ledger, marks, may_move=may_move)
    return Anchor(anchor.file, _placed(anchor, ledger, may_move=may_move))


def find_anchor(folder: Path, ledger: Path) -> Anchor | None:
    """Return the anchor of a ledger, if there is one. Nothing is written."""
    if kind_of(folder) != "folder":
        return None
    return _match(_anchors(folder), ledger.resolve(), ())


def ledger_of_copies(folder: Path, data: Path) -> Path | None:
    """Return the ledger of a file of data, which its copies and links share; None if unknown.

    Nothing is written.
    """
    if kind_of(folder) != "folder":
        return None
    anchor = _that_knows(_anchors(folder), data, file_marks(data))
    return None if anchor is None else anchor.ledger


def knows_ledger_and_place(folder: Path, ledger: Path, data: Path) -> bool:
    """Return whether runs of this owner have spent from a ledger, and on data at this place.

    Then the anchors tell which ledger the data have. Nothing is written.

    Args:
        folder: the folder of the anchors.
        ledger: the ledger.
        data: the file of data.
    """
    spent = [anchor for anchor in _anchors(folder) if anchor.record.rows]
    of_ledger = any(anchor.ledger == ledger for anchor in spent)
    return of_ledger and any(anchor.record.knows(_place_mark(data)) for anchor in spent)


def _chosen(
    anchors: Sequence[Anchor],
    folder: Path,
    ledger: Path,
    marks: Sequence[str],
    *,
    may_move: bool,
) -> Anchor:
    """Return the anchor of data or of a ledger; a new one if none is known.

    Args:
        anchors: the anchors of the folder.
        folder: the folder.
        ledger: where the run file expects the ledger.
        marks: what the data are known by.
        may_move: whether the ledger of known data is used wherever it is.

    Raises:
        PrivacyRefused: the data have two ledgers, and the run file does not choose.
    """
    anchor = _match(anchors, ledger, marks)
    if anchor is not None and may_move:
        _check_one_ledger(anchors, anchor, marks)
    if anchor is not None:
        return anchor
    file = folder / f"{secrets.token_hex(8)}.json"
    salt = secrets.token_hex(16)
    return Anchor(file, AnchorRecord(str(ledger), 0, NO_FIRST_ROW, NO_ROW, salt, ()))


def _match(anchors: Sequence[Anchor], ledger: Path, marks: Sequence[str]) -> Anchor | None:
    """Return the anchor that knows the data; else that of the path; else that of a moved ledger."""
    found = _that_knows(anchors, ledger, marks)
    if found is not None:
        return found
    for anchor in anchors:
        if anchor.ledger == ledger:
            return anchor
    first = _first_row(ledger)
    for anchor in anchors:
        if first != NO_FIRST_ROW and anchor.record.first == first:
            return anchor
    return None


def _that_knows(anchors: Sequence[Anchor], ledger: Path, marks: Sequence[str]) -> Anchor | None:
    """Return the anchor that knows the data, and of two that of `ledger`; None if none does."""
    # Equal contents come before an equal place, where there may be other data by now.
    for mark in marks:
        known = [anchor for anchor in anchors if anchor.record.knows(mark)]
        # Of two, the run file may have chosen one; a ledger without rows has no say.
        known.sort(key=lambda anchor: (anchor.ledger != ledger, anchor.record.rows == 0))
        if known:
            return known[0]
    return None


def _check_one_ledger(anchors: Sequence[Anchor], chosen: Anchor, marks: Sequence[str]) -> None:
    """Refuse data whose contents have one ledger, and whose place has another.

    An edited copy that was saved back is such a case: its examples have spent from both.

    Raises:
        PrivacyRefused: there are two, and the run file does not choose.
    """
    for other in anchors:
        spent = other is not chosen and other.record.rows > 0
        if spent and other.record.knows_any(marks):
            raise PrivacyRefused(
                f"these data have their privacy ledger at {chosen.ledger}, and other data "
                f"that were at this place have theirs at {other.ledger}: of examples that are "
                "in both, epsilon adds up",
                "if no example is in both, set privacy.ledger to the first; else put the data "
                "back as they were",
            )


def _placed(anchor: Anchor, ledger: Path, *, may_move: bool) -> AnchorRecord:
    """Return the record of an anchor, with the place where the ledger is now.

    Raises:
        PrivacyRefused: the data have another ledger, or theirs is missing.
    """
    record = anchor.record
    if anchor.ledger == ledger or record.rows == 0:
        return replace(record, ledger=str(ledger))
    # A ledger that was moved keeps its first row.
    if not anchor.ledger.exists():
        if _first_row(ledger) == record.first:
            return replace(record, ledger=str(ledger))
        raise PrivacyRefused(
            f"the privacy ledger of these data, {anchor.ledger}, is missing",
            f"restore its {record.rows} rows; to forget what was spent, delete {anchor.file}",
        )
    if not may_move:
        raise PrivacyRefused(
            f"these data have their privacy ledger at {anchor.ledger}, not at {ledger}",
            "set privacy.ledger to that file, or remove the setting; give other data a place of "
            "their own",
        )
    return record


def _first_row(ledger: Path) -> str:
    """Return the hash of a ledger's first row."""
    lines = ledger_lines(ledger) if ledger.is_file() else []
    return row_hash(lines[0]) if lines else NO_FIRST_ROW


def _anchors(folder: Path) -> list[Anchor]:
    """Read all anchors of a folder.

    Raises:
        ArtifactRefused: a file is not an anchor.
    """
    with reading(folder):
        files = sorted(folder.glob("[0-9a-f]*.json"))
    return [Anchor(file, _read_record(file)) for file in files]


def _read_record(file: Path) -> AnchorRecord:
    """Read the contents of an anchor.

    Raises:
        ArtifactRefused: the file is not an anchor.
    """
    try:
        return read_dataclass(file, AnchorRecord, _MOST_BYTES)
    except (OSError, ValueError):
        # It may be that of these data: nothing else tells whose it is. Without it, a run could
        # begin a second ledger for them.
        raise ArtifactRefused(
            f"{file} is not the anchor of a privacy ledger",
            "restore it from a copy; without it, nothing knows which data have spent from its "
            "ledger",
        ) from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Create the folder of the anchors, and keep other runs from adding one at the same time.

    Raises:
        InputError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("w")
    except OSError as error:
        raise _unwritable(folder, error) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check_anchors_writable(folder: Path) -> None:
    """Refuse a folder in which no anchor can be written. Nothing is written.

    Raises:
        InputError: this account may not write there.
    """
    try:
        check_write_access(folder)
        check_write_access(folder / _LOCK)
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot write the anchors of privacy ledgers to {folder}: {error.strerror}",
        "set privacy.ledger_anchors to a folder that stays with the owner",
    )
