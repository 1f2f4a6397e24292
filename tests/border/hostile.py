"""Change an artifact as a hostile sender would: whatever is changed, its manifest agrees."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from post_dist.artifacts.manifest import FILE_NAME
from post_dist.files import file_digest

Change = Callable[[Path], object]


def sign(folder: Path) -> None:
    """Write the hashes of all files into the manifest; what is no file gets a made-up one."""
    path = folder / FILE_NAME
    manifest = json.loads(path.read_text())
    manifest["files"] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name != FILE_NAME:
            regular = entry.is_file() and entry.stat().st_size < 1 << 30
            manifest["files"][entry.name] = file_digest(entry) if regular else "0" * 64
    path.write_text(json.dumps(manifest))


def edit_json(name: str, **fields: Any) -> Change:
    """Return a change of fields of a JSON file. A value of None removes the field."""

    def change(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) | fields
        removed = {key for key, value in fields.items() if value is None}
        kept = {key: value for key, value in content.items() if key not in removed}
        path.write_text(json.dumps(kept))

    return change


def put_text(name: str, text: str | bytes) -> Change:
    """Return a change that writes a file."""
    content = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / name).write_bytes(content)


def replace_by_link(name: str) -> Change:
    """Return a change that moves a file out of the folder and leaves a link."""

    def change(folder: Path) -> None:
        outside = folder.parent / f"outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return change


def replace_by_fifo(name: str) -> Change:
    """Return a change that replaces a file by a FIFO, which a reader would wait for."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def replace_by_sparse(name: str, size: int) -> Change:
    """Return a change that replaces a file by zeros that take no place on the disk."""

    def change(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(size)

    return change
