"""Hash files, and write them atomically: a reader finds a complete file or folder, or none."""

import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from safetensors import SafetensorError

from post_dist.errors import EnvironmentFault, InputError
from post_dist.paths import reading

log = logging.getLogger(__name__)

_BLOCK_BYTES = 4 << 20
FOLDER_MODE = 0o775
"""Permissions of a new folder, from which the umask may take more. A group may work together."""
_OTHERS_READ = 0o055


def digest_of(value: Any) -> str:
    """Return the sha256 of a JSON value. It does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path, between: Callable[[], None] | None = None) -> str:
    """Return the sha256 of a file's contents.

    Args:
        path: the file.
        between: function that is called after each block of a large file.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            if between is not None:
                between()
    return digest.hexdigest()


def file_digests(folder: Path, pattern: str = "*", *, hidden: bool = True) -> dict[str, str]:
    """Return the sha256 of each file in a folder, by the file's path relative to the folder.

    Args:
        folder: the folder, with the folders in it.
        pattern: pattern of the files' names, such as `*.safetensors`.
        hidden: whether files and folders whose names begin with a dot count. File systems and
            desktops write such files, and so does the hub's client at each download.
    """
    files = sorted(entry for entry in folder.rglob(pattern) if entry.is_file())
    if not hidden:
        files = [file for file in files if not _is_hidden(file.relative_to(folder))]
    # A model folder may hold hundreds of GB. Hashing a file does not hold Python's lock.
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(file_digest, files))
    names = [str(file.relative_to(folder)) for file in files]
    return dict(zip(names, digests, strict=True))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def fingerprint(path: Path) -> str:
    """Return a digest of every byte of a file or of a model folder, without its hidden files.

    Raises:
        InputError: it cannot be read.
    """
    with reading(path):
        if path.is_file():
            return file_digest(path)
        return digest_of(file_digests(path, hidden=False))


def digest_as_read(digest: str, suffix: str) -> str:
    """Return a digest of what is read from a data file, from that of its bytes and its file type.

    The same bytes are other texts in TSV, which has no quotes, than in CSV. JSONL and Parquet hold
    nothing that another type could read. CSV keeps the digest of its bytes, as older runs have it.
    """
    if suffix.lower() != ".tsv":
        return digest
    return digest_of({"file": digest, "type": suffix.lower()})


def make_folder(folder: Path, mode: int = FOLDER_MODE) -> None:
    """Create a folder and those above it, where they do not exist.

    Under a umask that lets all others write to new folders, they could replace what is in these.

    Args:
        folder: the folder.
        mode: its permissions, if it is new. A group may write to new folders above it only if it
            may write to the folder.

    Raises:
        InputError: the folder cannot be created.
        EnvironmentFault: the disk is full.
    """
    with writing(folder):
        for above in reversed(folder.parents):
            if not above.exists():
                above.mkdir(mode | _OTHERS_READ, exist_ok=True)
        # An NFS client may remember that there is none. Creating it asks the server.
        folder.mkdir(mode, exist_ok=True)


def write_folder(destination: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder atomically: fill a temporary folder next to it, flush it, rename it.

    Raises:
        InputError: the folder cannot be written to.
        EnvironmentFault: the disk is full.
    """
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        with writing(destination):
            # A killed process may have left a half-written folder.
            shutil.rmtree(partial, ignore_errors=True)
            make_folder(partial)
            fill(partial)
            put_in_place(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_file(destination: Path, fill: Callable[[Path], object]) -> None:
    """Write a file atomically: fill a temporary file next to it, flush it, rename it.

    Several processes may write the same file at once. The last rename wins.

    Raises:
        InputError: the file cannot be written to.
        EnvironmentFault: the disk is full.
    """
    # The temporary name is unique, because several processes may write at once.
    partial = destination.with_name(f".{uuid4().hex[:8]}.{destination.name}")
    with writing(destination):
        try:
            make_folder(destination.parent)
            fill(partial)
            flush(partial)
            partial.rename(destination)
        finally:
            partial.unlink(missing_ok=True)
        flush(destination.parent)


def check_writable(destination: Path) -> None:
    """Refuse a file that cannot be written to, before hours of work for it. It is left as it is.

    Raises:
        InputError: the file cannot be written to.
        EnvironmentFault: the disk is full.
    """
    with writing(destination):
        make_folder(destination.parent)
        # To open a file for appending changes nothing in it.
        is_new = not destination.exists()
        destination.open("ab").close()
        if is_new:
            destination.unlink()


def check_write_access(destination: Path) -> None:
    """Raise the error that writing a file or a folder would end with, but write nothing.

    Missing folders above it count as made.

    Raises:
        OSError: this account may not write there.
    """
    place = destination.absolute()
    while not place.exists():
        place = place.parent
    is_folder = place.is_dir()
    if place != destination.absolute() and not is_folder:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(place, os.W_OK | os.X_OK if is_folder else os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def remove_unfinished(destination: Path) -> None:
    """Remove what killed processes have left of a file. No other process may be writing it.

    Raises:
        InputError: it cannot be removed.
    """
    with writing(destination):
        for partial in destination.parent.glob(f".????????.{glob.escape(destination.name)}"):
            partial.unlink()


def lock_file(file: IO[str], *, shared: bool = False) -> bool:
    """Lock an open file without waiting, and return whether that worked.

    The lock ends when the file is closed or its process ends. On a file system without locks, a
    warning is logged, and the result is True.

    Args:
        file: the file.
        shared: whether others may hold the lock too, if they also share it.
    """
    try:
        return try_lock(file, shared=shared)
    except OSError as error:
        message = "%s cannot be locked: %s; make sure that no other process works in it"
        log.warning(message, Path(file.name).parent, error.strerror)
    return True


def try_lock(file: IO[str], *, shared: bool = False) -> bool:
    """Lock an open file like `lock_file`, but do not take a missing lock for a free file.

    Args:
        file: the file.
        shared: whether others may hold the lock too, if they also share it.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def writing(destination: Path) -> Iterator[None]:
    """Turn errors of writing into errors that tell the user what to do.

    Raises:
        InputError: the destination cannot be written to.
        EnvironmentFault: the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk only in its message, without an errno.
        reason = getattr(error, "strerror", None) or str(error)
        disk_is_full = os.strerror(errno.ENOSPC) in reason
        if disk_is_full or getattr(error, "errno", None) == errno.ENOSPC:
            raise EnvironmentFault(
                f"cannot write {destination}: the disk is full",
                "free some space, then run the same command again",
            ) from None
        raise InputError(
            f"cannot write {destination}: {reason}", "choose another place that you may write to"
        ) from None


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file. A last line that a full disk has cut stays a line of its own."""
    with path.open("ab+") as file:
        is_empty = file.seek(0, os.SEEK_END) == 0
        if not is_empty:
            file.seek(-1, os.SEEK_END)
        is_cut = not is_empty and file.read(1) != b"\n"
        file.write(b"\n" * is_cut + line.encode() + b"\n")


def put_in_place(partial: Path, destination: Path) -> None:
    """Flush a finished folder to disk, then give it its final name."""
    # If the folder were renamed first, a power failure could leave it with empty files.
    for path in [*partial.rglob("*"), partial]:
        flush(path)
    partial.rename(destination)
    flush(destination.parent)


def flush(path: Path) -> None:
    """Wait until the contents of a file or folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
