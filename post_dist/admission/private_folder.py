"""A private folder for copies, which a later command removes if this one is killed."""

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from post_dist.errors import EnvironmentFault

PREFIX = ".post_dist-quarantine-"
"""Beginning of the name of each private folder."""

_SECONDS_TO_LOCK = 60
"""Time after which a folder without a lock belongs to nobody: a command locks it at once."""


@contextmanager
def private_folder(parent: Path | None = None) -> Iterator[Path]:
    """Make a folder that only this user can read, and delete it afterwards.

    First the folders of commands that were killed are deleted.

    Args:
        parent: where to make it; None for the folder of temporary files.

    Yields:
        The folder.

    Raises:
        EnvironmentFault: it cannot be made.
    """
    around = Path(tempfile.gettempdir()) if parent is None else parent
    _remove_left(around)
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=around))
    except OSError as error:
        raise EnvironmentFault(
            f"cannot make a folder in {around}: {error.strerror}",
            "free some space there, or make it a folder that you may write to",
        ) from None
    try:
        # The lock ends with this process, even if that is killed.
        with _locked(folder, fcntl.LOCK_SH):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left(around: Path) -> None:
    """Remove the folders of commands that were killed. A student's copy may have many GB."""
    for left in around.glob(f"{PREFIX}*"):
        with suppress(OSError):
            status = left.lstat()
            is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
            # A folder that was made just now may not be locked yet.
            if is_ours and time.time() - status.st_mtime > _SECONDS_TO_LOCK:
                with _locked(left, fcntl.LOCK_EX) as free:
                    if free:
                        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[bool]:
    """Lock a folder; the value tells whether that worked. Some file systems lock no folders."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        locked = True
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)
