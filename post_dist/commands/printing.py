"""Print the numbers that a command computes, as text or as JSON."""

import json
import math
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from post_dist.errors import PostDistError


class _Answers:
    """The one object of `--json`.

    Attributes:
        stream: a copy of standard output that nothing else writes to; None for standard output.
        given: whether the command has printed its object, or tried to.
    """

    stream: TextIO | None = None
    given = False


def reserve_stdout() -> None:
    """Keep standard output for JSON. Whatever else is printed goes to standard error.

    Libraries print warnings on standard output, and gloo does so in C++.
    """
    if _Answers.stream is None:
        sys.stdout.flush()
        _Answers.stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)


def expect_object() -> None:
    """Begin a command, which has printed no object yet."""
    _Answers.given = False


def print_numbers(numbers: Mapping[str, Any], as_json: bool) -> None:
    """Print one JSON object, or a line for each number.

    Args:
        numbers: the values, by name.
        as_json: whether to print JSON.
    """
    if as_json:
        print_json(numbers)
        return
    # A list, such as the problems of an artifact, has a line for each entry.
    for name, value in numbers.items():
        if isinstance(value, list):
            print(f"{name}:", *(f"  {_plain(entry)}" for entry in value), sep="\n")
        elif isinstance(value, float):
            print(f"{name}: {value:.6g}")
        else:
            print(f"{name}: {_plain(value)}")


def _plain(value: Any) -> str:
    """Return a value as text; a mapping as `steps_planned 80, epsilon 7.99`."""
    if not isinstance(value, Mapping):
        return str(value)
    parts = []
    for name, inner in value.items():
        shown = f"{inner:.6g}" if isinstance(inner, float) else inner
        parts.append(f"{name} {shown}")
    return ", ".join(parts)


def refuse(numbers: Mapping[str, Any], error: PostDistError, as_json: bool) -> NoReturn:
    """Print the numbers that an error is about, then raise it. As JSON, both are one object.

    Args:
        numbers: the values, by name.
        error: the error.
        as_json: whether to print JSON.
    """
    print_numbers({**numbers, **error.as_object()} if as_json else numbers, as_json)
    raise error


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object. Infinity and NaN become null, which JSON has, and paths strings."""
    text = json.dumps(_plain_json(value), allow_nan=False)
    # If nobody reads the object, nobody reads an error about that.
    _Answers.given = True
    print(text, file=_Answers.stream or sys.stdout, flush=True)


def print_error(error: Mapping[str, Any]) -> None:
    """Print an error as JSON, unless the command has printed its own object before it failed."""
    if not _Answers.given:
        # If nobody reads the object, the exit code still tells of the error. An exception from here
        # would be printed together with the one that is being handled, and its private message.
        with suppress(OSError):
            print_json(error)


def _plain_json(value: Any) -> Any:
    """Replace infinity and NaN with None, and paths with strings, at any depth."""
    if isinstance(value, Mapping):
        return {name: _plain_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value
