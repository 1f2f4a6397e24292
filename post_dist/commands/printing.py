"""Print the numbers that a command computes, as text or as JSON."""

import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO


class _Answers:
    """The one object of `--json`.

    Attributes:
        stream: a copy of standard output that nothing else writes to; None for standard output.
        given: whether the command has printed its object.
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


def _plain(entry: Any) -> str:
    """Return a mapping as text, such as `steps_planned 80, epsilon 7.99`."""
    if not isinstance(entry, Mapping):
        return str(entry)
    parts = []
    for name, value in entry.items():
        shown = f"{value:.6g}" if isinstance(value, float) else value
        parts.append(f"{name} {shown}")
    return ", ".join(parts)


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object. JSON has no infinity and no NaN, so they become null."""
    text = json.dumps(_finite(value), allow_nan=False)
    print(text, file=_Answers.stream or sys.stdout, flush=True)
    _Answers.given = True


def print_error(error: Mapping[str, Any]) -> None:
    """Print an error as JSON, unless the command has printed its own object before it failed."""
    if not _Answers.given:
        print_json(error)


def _finite(value: Any) -> Any:
    """Replace infinity and NaN with None, at any depth."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
