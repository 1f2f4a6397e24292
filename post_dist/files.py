"""Whole files or none, and their hashes: what every writer of this package goes through."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError

from post_dist.errors import EnvironmentFault, InputError

_SMALL_FILE_BYTES = 1 << 22


def digest_of(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """A digest of a file or model folder that is fast for weights of any size.

    Files up to 4 MiB are hashed whole; of a larger one its size and its first and last MiB.
    """
    if path.is_file():
        return file_digest(path)
    parts = {}
    for file in sorted(entry for entry in path.rglob("*") if entry.is_file()):
        size = file.stat().st_size
        if size <= _SMALL_FILE_BYTES:
            parts[str(file.relative_to(path))] = file_digest(file)
        else:
            with file.open("rb") as stream:
                head = stream.read(1 << 20)
                stream.seek(-(1 << 20), os.SEEK_END)
                parts[str(file.relative_to(path))] = (
                    f"{size} {hashlib.sha256(head + stream.read()).hexdigest()}"
                )
    return digest_of(parts)


def write_folder(destination: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder whole or not at all: fill a temporary one beside it, flush it to disk, rename it.

    Raises:
        InputError: the place cannot be written to.
        EnvironmentFault: the disk is full.
    """
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        with writing(destination):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            fill(partial)
            put_in_place(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_file(destination: Path, fill: Callable[[Path], object]) -> None:
    """The same for a file. Several processes may make one at once: the last one's is kept.

    Raises:
        InputError: the place cannot be written to.
        EnvironmentFault: the disk is full.
    """
    partial = destination.with_name(f".{uuid4().hex[:8]}.{destination.name}")
    with writing(destination):
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            fill(partial)
            _flush(partial)
            partial.rename(destination)
        finally:
            partial.unlink(missing_ok=True)
        _flush(destination.parent)


@contextmanager
def writing(destination: Path) -> Iterator[None]:
    """Turn what a disk answers into an error that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in reason:
            raise EnvironmentFault(
                f"cannot write {destination}: the disk is full",
                "make room; the same command goes on",
            ) from None
        raise InputError(f"cannot write {destination}: {reason}", "give another --output") from None


def put_in_place(partial: Path, destination: Path) -> None:
    """Flush a folder that is whole to disk, and only then give it its name."""
    for path in [*partial.rglob("*"), partial]:
        _flush(path)
    partial.rename(destination)
    _flush(destination.parent)


def file_digests(folder: Path) -> dict[str, str]:
    """The sha256 of each file of a folder by its path in there."""
    return {
        str(path.relative_to(folder)): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
