"""Look at the files and folders that a user names. What cannot be read is told with its name."""

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from post_dist.errors import InputError

PathKind = Literal["", "file", "folder", "other"]
"""What is at a path; empty for nothing."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of looking at an input, or of reading it, into an error that names it.

    Raises:
        InputError: it cannot be read.
    """
    try:
        yield
    except OSError as error:
        # In a folder, it may be one of the files.
        name = path if error.filename is None else error.filename
        raise InputError(
            f"cannot read {name}: {error.strerror or 'it cannot be opened'}",
            "give another path, or let this account read it",
        ) from None
    except ValueError:
        # It holds a zero byte, or half a character.
        raise InputError(f"cannot read {str(path)!a:.200}: no file has such a name") from None


def kind_of(path: Path) -> PathKind:
    """Return what is at a path. Links are followed.

    `Path.exists` and its like raise the errors of the system, and each Python version other ones.

    Raises:
        InputError: this account cannot look there, or no file has such a name.
    """
    with reading(path):
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return ""
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "other"
