"""Read JSON from others: no key twice, no NaN, nothing that cannot be written out again."""

import json
import math
from pathlib import Path
from typing import Any

from post_dist.errors import ArtifactRefused

SMALL_FILE_BYTES = 1 << 16
"""A JSON file, or the header of a small safetensors file, above this size is not parsed."""


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file whose size has been limited.

    Raises:
        ArtifactRefused: it is not a JSON object in UTF-8, or Python and other parsers may read it
            differently.
    """
    try:
        return parse_object(path.read_bytes())
    except ValueError as error:
        raise ArtifactRefused(f"{path.name} is {error}") from None


def read_small(path: Path) -> dict[str, Any]:
    """Read the JSON object in a small file.

    Raises:
        ValueError: the file is too large, or holds anything else.
    """
    if path.stat().st_size > SMALL_FILE_BYTES:
        raise ValueError("too large")
    return parse_object(path.read_bytes())


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: it is none, or other parsers may read it differently.
    """
    try:
        # Python's parser would guess other encodings of bytes.
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_number,
            parse_int=_integer,
        )
        # A lone surrogate passes the parser and fails when it is printed.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise ValueError("not plain JSON") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key appears twice")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _number(digits: str) -> float:
    # Python reads 1e999 as infinity, which is written out as no JSON.
    value = float(digits)
    if math.isinf(value):
        raise ValueError("a number is too large")
    return value


def _integer(digits: str) -> int:
    # Python takes integers that no float holds. They fail where they are formatted.
    _number(digits)
    return int(digits)
