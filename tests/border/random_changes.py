"""Random changes of a file: bytes, and values of a JSON file."""

import json
import random
from pathlib import Path
from typing import Any

_SCALARS = (None, True, False, 0, 1, -1, 2, 5, 31, 1 << 31, 1 << 64, 0.5, -0.5, 1e-300, 1e300)
_TEXTS = ("", " ", "{text}", "{mask}", "{text}{text}", "\ud800", "\n\x1b[31m", "é" * 40, "../x")
_NESTED: tuple[Any, ...] = ([], {}, [[]], [None], {"a": 1}, [["bad"], ["good"]], ["a"] * 50)


def value(chance: random.Random) -> Any:
    """Return a JSON value of any kind."""
    return chance.choice(
        (*_SCALARS, *_TEXTS, *_NESTED, chance.random() * 10, chance.getrandbits(40))
    )


def change_value(path: Path, chance: random.Random, name: str = "") -> None:
    """Replace, remove or add a value at any depth of a JSON file.

    Args:
        path: the file.
        chance: the source of randomness.
        name: a field to set at the top of the file; empty for any value.
    """
    try:
        content = json.loads(content_of(path))
    except ValueError:  # an earlier change has damaged it
        return
    if name and isinstance(content, dict):
        content[name] = value(chance)
    else:
        _change_inside(content, chance)
    path.write_text(json.dumps(content))


def _change_inside(node: Any, chance: random.Random) -> None:
    if not isinstance(node, dict | list) or not node:
        return
    places = [*node, "more"] if isinstance(node, dict) else range(len(node))
    place = chance.choice(places)
    inner = None if place == "more" else node[place]
    if isinstance(inner, dict | list) and inner and chance.random() < 0.6:
        _change_inside(inner, chance)
    elif inner is not None and chance.random() < 0.1:
        del node[place]
    else:
        node[place] = value(chance)


def change_bytes(path: Path, chance: random.Random) -> None:
    """Flip, cut or repeat bytes of a file."""
    content = bytearray(content_of(path))
    if not content:
        return
    place = chance.randrange(len(content) + 1)
    kind = chance.randrange(3)
    if kind == 0 and place < len(content):
        content[place] = chance.randrange(256)
    elif kind == 1:
        del content[place : place + chance.randrange(1, 40)]
    else:
        content[place:place] = content[place : place + chance.randrange(1, 40)]
    path.write_bytes(content)


def content_of(path: Path) -> bytes:
    """Return the bytes of a file; none of one that an earlier change has made endless."""
    is_small = path.is_file() and path.stat().st_size < 1 << 24
    return path.read_bytes() if is_small else b""
