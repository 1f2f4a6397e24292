"""Print the numbers that a command computes, as text or as JSON."""

import json
import math
from collections.abc import Mapping
from typing import Any


def print_numbers(numbers: Mapping[str, Any], as_json: bool) -> None:
    """Print one JSON object, or a line for each number.

    JSON has no infinity, so infinity becomes null.

    Args:
        numbers: the values, by name.
        as_json: whether to print JSON.
    """
    if as_json:
        finite = {}
        for name, value in numbers.items():
            finite[name] = None if value == math.inf else value
        print(json.dumps(finite))
        return
    # A list, such as the problems of an artifact, has a line for each entry.
    for name, value in numbers.items():
        if isinstance(value, list):
            print(f"{name}:", *(f"  {entry}" for entry in value), sep="\n")
        elif isinstance(value, float):
            print(f"{name}: {value:.6g}")
        else:
            print(f"{name}: {value}")
