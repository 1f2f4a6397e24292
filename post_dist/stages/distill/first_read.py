"""How far the student has read the teacher's signals: the file `first` in their folder.

This module loads no torch, because the program that restarts Slurm jobs reads the file too.
"""

import re
from pathlib import Path

from post_dist.artifacts.strict_json import read_bytes
from post_dist.errors import EnvironmentFault
from post_dist.files import write_file

NAME = "first"
"""Name of the file with the number of the first file that the student still reads."""
_NUMBER = re.compile(rb"[0-9]{1,12}")
_MOST_BYTES = 12


def read_first(folder: Path, most: int | None = None) -> int:
    """Return the number of the first file that the student still reads; 0 before it starts.

    Args:
        folder: the folder of signals.
        most: number of all files; None if it is not known.

    Raises:
        EnvironmentFault: the file does not hold such a number.
    """
    path = folder / NAME
    try:
        text = read_bytes(path, _MOST_BYTES)
    except FileNotFoundError:
        return 0
    except (OSError, ValueError):
        text = b""
    if _NUMBER.fullmatch(text) and (most is None or int(text) <= most):
        return int(text)
    raise EnvironmentFault(
        f"{path} is damaged: it is not the number of a file",
        "delete it, and start distill again: the student writes it anew",
    )


def write_first(folder: Path, first: int) -> None:
    """Write the number of the first file that the student still reads.

    Raises:
        InputError: the folder cannot be written to.
        EnvironmentFault: the disk is full.
    """
    write_file(folder / NAME, lambda partial: partial.write_text(str(first)))
