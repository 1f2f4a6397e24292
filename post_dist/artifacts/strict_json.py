"""Read JSON from others: no key twice, no NaN, nothing that cannot be written out again.

The state that a run has written itself is read in the same way. A disk may damage it, an older
version may have written it, and a folder may come from others.
"""

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter

from post_dist.errors import ArtifactRefused

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")

SMALL_FILE_BYTES = 1 << 16
"""A JSON file, or the header of a small safetensors file, above this size is not parsed."""
_NUMBER_BYTES = 100


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


def read_small(path: Path, most_bytes: int = SMALL_FILE_BYTES) -> dict[str, Any]:
    """Read the JSON object in a small file.

    Args:
        path: the file.
        most_bytes: its largest size.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a regular file, is too large, or holds anything else.
    """
    return parse_object(read_bytes(path, most_bytes))


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """Read a small regular file.

    Args:
        path: the file.
        most_bytes: its largest size.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a regular file, or is too large.
    """
    status = path.stat()
    # A pipe would make the reader wait for ever.
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("no regular file")
    if status.st_size > most_bytes:
        raise ValueError("too large")
    return path.read_bytes()


def read_number(path: Path) -> float:
    """Read a file that holds one number.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds anything else.
    """
    return float(read_bytes(path, _NUMBER_BYTES))


def read_dataclass(path: Path, kind: type[Record], most_bytes: int = SMALL_FILE_BYTES) -> Record:
    """Read a dataclass that was written as a JSON object.

    Args:
        path: the file.
        kind: the dataclass.
        most_bytes: largest size of the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it does not hold exactly these fields, each with its type.
    """
    return dataclass_of(kind, read_small(path, most_bytes))


def dataclass_of(kind: type[Record], given: Mapping[str, Any]) -> Record:
    """Return the dataclass whose fields a JSON object holds.

    Raises:
        ValueError: it does not hold exactly these fields, each with its type.
    """
    if set(given) != {field.name for field in fields(kind)}:
        raise ValueError(f"not the fields of {kind.__name__}")
    # In this mode, JSON's lists are tuples, and no text or truth value is a number.
    return _adapter(kind).validate_json(json.dumps(given), strict=True)


@lru_cache
def _adapter(kind: type[Record]) -> TypeAdapter[Record]:
    return TypeAdapter(kind)


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
