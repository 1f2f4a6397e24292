"""Print the numbers that a command computes, as text or as JSON."""

import json
import math
from collections.abc import Mapping
from typing import Any


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
            print(f"{name}:", *(f"  {entry}" for entry in value), sep="\n")
        elif isinstance(value, float):
            print(f"{name}: {value:.6g}")
        else:
            print(f"{name}: {value}")


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object. JSON has no infinity and no NaN, so they become null."""
    print(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    """Replace infinity and NaN with None, at any depth."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
