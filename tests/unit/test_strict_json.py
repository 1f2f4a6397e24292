"""State that a run reads again: whatever is in the file, the reader says so and does not wait."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from post_dist.artifacts.strict_json import read_dataclass, read_number, read_small


@dataclass(frozen=True)
class Kept:
    """A record with a field of each kind that the program's own records have."""

    count: Annotated[int, Field(ge=0)]
    share: float
    names: tuple[str, ...]
    done: bool


HONEST = '{"count": 3, "share": 0.5, "names": ["a"], "done": true}'


def read_kept(path: Path) -> Kept:
    return read_dataclass(path, Kept)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    path.write_text(HONEST)
    assert read_kept(path) == Kept(3, 0.5, ("a",), True)
    path.write_text("-0.25")
    assert read_number(path) == -0.25


@pytest.mark.parametrize(
    "text",
    [
        *("", "7", "null", "[]", "{}", "{", "[" * 100_000, '{"a":' * 100_000),
        HONEST.replace("3", "-3"),
        HONEST.replace("3", "3.0"),
        HONEST.replace("3", "true"),
        HONEST.replace("3", '"3"'),
        HONEST.replace("3", "9" * 400),
        HONEST.replace("0.5", "NaN"),
        HONEST.replace("0.5", '"0.5"'),
        HONEST.replace('["a"]', '"a"'),
        HONEST.replace('["a"]', "[1]"),
        HONEST.replace("true", "1"),
        HONEST.replace("}", ', "more": 1}'),
        HONEST.replace("}", ', "count": 4}'),
        HONEST.replace(', "done": true', ""),
        HONEST + " " * (1 << 16),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "kept.json"
    path.write_text(text)
    with pytest.raises(ValueError):  # noqa: PT011  # the caller says which file and what to do
        read_kept(path)


@pytest.mark.parametrize("read", [read_small, read_kept, read_number])
def test_what_is_no_regular_file_is_not_waited_for(
    tmp_path: Path, read: Callable[[Path], Any]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "."):
        with pytest.raises(ValueError, match="no regular file"):
            read(tmp_path / name)
    with pytest.raises(OSError, match="No such file"):
        read(tmp_path / "none")
