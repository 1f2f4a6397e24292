"""The folders of checkpoints, by their names. This module loads no torch."""

import re
from pathlib import Path

_NAME = re.compile(r"step-(0|[1-9][0-9]{0,11})")
"""Name of a checkpoint. Somebody may have put a copy beside it, such as step-20.bak."""


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first. Links and files are none."""
    found = [
        path
        for path in folder.glob("step-*")
        if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))
