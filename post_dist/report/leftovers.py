"""What a folder of runs holds that nothing needs: unfinished runs, and caches beside runs."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from post_dist.artifacts.manifest import FILE_NAME
from post_dist.artifacts.run_folder import ADMITTED, SETTINGS
from post_dist.files import lock_file, writing
from post_dist.report.runs import run_folders

_CACHES = {
    ADMITTED: "copies of students",
    "answers": "answers of models",
    "teacher-signals-*": "signals of the teacher",
}
"""Folders beside runs that a later run makes again, by the pattern of their names."""


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


def leftovers(folder: Path) -> list[Leftover]:
    """Find what can be removed below a folder. Finished runs, and runs in progress, are kept.

    Raises:
        InputError: there is no such folder.
    """
    found = []
    around: dict[Path, bool] = {}
    for path in run_folders(folder):
        if path.parent.name == ADMITTED:
            around.setdefault(path.parent.parent, True)
        if not (path / SETTINGS).is_file():
            continue
        with _held(path) as free:
            around[path.parent] = around.get(path.parent, True) and free
        if free and not (path / "artifact" / FILE_NAME).is_file():
            found.append(_leftover(path, "unfinished run"))
    # A run in progress may read any cache beside it.
    for place, free in around.items():
        found += _caches(place) if free else []
    return sorted(found, key=lambda leftover: leftover.path)


def remove(leftover: Leftover) -> None:
    """Remove a leftover, unless a run has been started in it since.

    Raises:
        InputError: it cannot be removed.
    """
    with _held(leftover.path) as free, writing(leftover.path):
        if free:
            shutil.rmtree(leftover.path)


def _caches(place: Path) -> list[Leftover]:
    """Find the caches beside runs."""
    found = []
    for pattern, what in _CACHES.items():
        for path in place.glob(pattern):
            if not path.is_dir() or path.is_symlink():
                continue
            with _held(path) as free:
                if free:
                    found.append(_leftover(path, what))
    return found


def _leftover(path: Path, what: str) -> Leftover:
    files = (each for each in path.rglob("*") if each.is_file() and not each.is_symlink())
    return Leftover(path, what, sum(each.stat().st_size for each in files) / 2**20)


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Hold the lock of a folder; the value tells whether no other process holds it."""
    with ExitStack() as files:
        lock = path / "lock"
        if not lock.is_file():
            yield True
            return
        yield lock_file(files.enter_context(lock.open("a")))
