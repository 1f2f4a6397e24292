"""What a folder of runs holds that nothing needs: unfinished runs, and caches beside runs.

A folder may hold other things of its user. So a run must have the name and the files that the
stages give it, and a cache nothing but the files that belong there.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from post_dist.admission.private_folder import PREFIX
from post_dist.artifacts.run_folder import ADMITTED, RUN_MARKS, is_finished, is_run
from post_dist.errors import InputError, printable
from post_dist.files import try_lock, writing
from post_dist.report.runs import run_folders

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Cache:
    """A kind of folder beside runs that a later run makes again.

    Attributes:
        what: what it holds.
        name: regular expression of its name.
        entry: regular expression of the names in it.
    """

    what: str
    name: str
    entry: str


_PARTIAL = r"(?:\.[0-9a-f]{8}\.)?"
"""Beginning of the name of a file that is not finished."""
_CACHES = (
    _Cache("copies of students", ADMITTED, rf"[0-9a-f]{{16,64}}|{re.escape(PREFIX)}\w+"),
    _Cache("answers of models", "answers", rf"{_PARTIAL}[0-9a-f]{{16}}\.safetensors"),
    # Older versions had other files in them.
    _Cache("signals of the teacher", r"teacher-signals-[0-9a-f]{8}", r".*"),
)


@dataclass(frozen=True)
class Leftover:
    """A folder that can be removed.

    Attributes:
        path: the folder.
        what: what it holds.
        mib: its size in MiB.
    """

    path: Path
    what: str
    mib: float


@dataclass(frozen=True)
class _Kept:
    """Folders that stay, because nothing tells whether a run is in progress there.

    Attributes:
        unlockable: their file system has no locks.
        of_others: this user may not open their locks, or not look into them.
    """

    unlockable: list[Path] = field(default_factory=list)
    of_others: list[Path] = field(default_factory=list)

    def tell(self) -> None:
        """Log the folders, in one line for each reason."""
        reasons = {
            "without file locks a run in progress cannot be told from others": self.unlockable,
            "they are another user's, or read-only": self.of_others,
        }
        for reason, paths in reasons.items():
            if paths:
                shown = ", ".join(printable(str(path)) for path in paths)
                log.warning("kept, because %s: %s", reason, shown)


def leftovers(folder: Path) -> list[Leftover]:
    """Find what can be removed below a folder. Finished runs, and runs in progress, are kept.

    Raises:
        InputError: there is no such folder.
    """
    found = []
    kept = _Kept()
    around: dict[Path, bool] = {}
    for path in run_folders(folder):
        if path.parent.name == ADMITTED:
            around.setdefault(path.parent.parent, True)
        if not is_run(path):
            continue
        with _held(path, kept) as free:
            around[path.parent] = around.get(path.parent, True) and free
        if free and not is_finished(path):
            found.append(_leftover(path, "unfinished run"))
        elif free and (path / "checkpoints").is_dir():
            # The run was killed between its last two actions.
            found.append(_leftover(path / "checkpoints", "checkpoints not needed"))
    # A run in progress may read any cache beside it.
    for place, free in around.items():
        found += _caches(place, kept) if free else []
    kept.tell()
    return sorted(found, key=lambda leftover: leftover.path)


def remove(leftover: Leftover) -> None:
    """Remove a leftover, unless a run has been started in it since.

    Raises:
        InputError: it cannot be removed.
    """
    path = leftover.path
    with _held(path, _Kept()) as free, writing(path):
        if not free:
            return
        try:
            # The marks of a run go last. If this is killed, the rest is still found to be a run.
            for entry in path.iterdir():
                if entry.name not in RUN_MARKS:
                    _delete(entry)
            shutil.rmtree(path)
        except RecursionError:
            raise InputError(f"{path} is nested too deeply", "remove it by hand") from None


def _delete(path: Path) -> None:
    """Delete a file, a link or a folder. What a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _caches(place: Path, kept: _Kept) -> list[Leftover]:
    """Find the caches beside runs, and note those that stay."""
    found = []
    for path in place.iterdir():
        cache = next((kind for kind in _CACHES if re.fullmatch(kind.name, path.name)), None)
        if cache is None or path.is_symlink() or not path.is_dir():
            continue
        try:
            names = os.listdir(path)
        except OSError:
            kept.of_others.append(path)
            continue
        if not all(re.fullmatch(cache.entry, name) for name in names):
            continue
        with _held(path, kept) as free:
            if free:
                found.append(_leftover(path, cache.what))
    return found


def _leftover(path: Path, what: str) -> Leftover:
    # Folders that cannot be read are skipped.
    size = 0
    for place, _, files in os.walk(path):
        with suppress(OSError):
            size += sum(os.lstat(os.path.join(place, name)).st_size for name in files)
    return Leftover(path, what, size / 2**20)


@contextmanager
def _held(path: Path, kept: _Kept) -> Iterator[bool]:
    """Hold the lock of a folder; the value tells whether no other process holds it.

    A folder that cannot be locked may be in use, so it is one that stays.
    """
    with ExitStack() as files:
        lock = path / "lock"
        if lock.is_symlink() or not lock.is_file():
            yield True
            return
        try:
            file = files.enter_context(lock.open("a"))
        except OSError:
            kept.of_others.append(path)
            yield False
            return
        try:
            free = try_lock(file)
        except OSError:
            free = False
            kept.unlockable.append(path)
        yield free
