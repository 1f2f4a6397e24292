"""Read a safetensors file. Its layout is checked before a library allocates memory for it."""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from post_dist.artifacts.strict_json import parse_object
from post_dist.errors import ArtifactRefused

_LENGTH_BYTES = 8
"""A safetensors file starts with the length of its header, as an unsigned 64-bit number."""
_DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class TensorLayout:
    """A tensor in a file.

    Attributes:
        dtype: its type, such as `F32`.
        shape: its shape; no dimension is 0.
        first: its first byte behind the header.
        end: the byte behind its last one.
    """

    dtype: str
    shape: tuple[int, ...]
    first: int
    end: int


def read_layout(path: Path, most_header_bytes: int) -> dict[str, TensorLayout]:
    """Read the header of a safetensors file.

    Args:
        path: the file, which is not trusted.
        most_header_bytes: a larger header is refused before it is parsed.

    Returns:
        The layout of each tensor, by its name. Together they fill the file, without a gap and
        without overlap.

    Raises:
        ArtifactRefused: the file is anything else.
    """
    header, header_bytes = _read_header(path, most_header_bytes)
    # Such as the framework that wrote the file. The library takes only strings.
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or {type(each) for each in metadata.values()} - {str}:
        raise ArtifactRefused(f"{path}: its metadata are not strings")
    layouts = {name: _layout(path, entry) for name, entry in header.items()}
    end = 0
    for layout in sorted(layouts.values(), key=lambda layout: layout.first):
        if layout.first != end:
            raise _does_not_fit(path)
        end = layout.end
    if path.stat().st_size != _LENGTH_BYTES + header_bytes + end:
        raise _does_not_fit(path)
    return layouts


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file, whose layout has been checked.

    Raises:
        ArtifactRefused: the library refuses the file, or values are not finite.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError):
        raise ArtifactRefused(f"{path} is not a safetensors file") from None
    for tensor in tensors.values():
        if not torch.isfinite(tensor).all():
            raise ArtifactRefused(f"{path} holds values that are not finite")
    return tensors


def _layout(path: Path, entry: Any) -> TensorLayout:
    """Check the entry of one tensor in a header."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ArtifactRefused(f"{path} has a tensor without dtype, shape or place")
    dtype = entry["dtype"]
    # A hostile dtype may be a list, which cannot be looked up in a dictionary.
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        known = ", ".join(_DTYPE_BYTES)
        raise ArtifactRefused(f"{path} has dtype {ascii(dtype)[:20]}, not one of {known}")
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    if not _are_integers(shape) or min(shape, default=1) < 1:
        raise ArtifactRefused(f"{path} has a tensor without a shape")
    if not _are_integers(offsets) or len(offsets) != 2:
        raise _does_not_fit(path)
    first, end = offsets
    if first < 0 or end != first + math.prod(shape) * _DTYPE_BYTES[dtype]:
        raise _does_not_fit(path)
    return TensorLayout(dtype, tuple(shape), first, end)


def _read_header(path: Path, most_bytes: int) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file and its length in bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        if len(start) < _LENGTH_BYTES:
            raise ArtifactRefused(f"{path} is not a safetensors file")
        (header_bytes,) = struct.unpack("<Q", start)
        if header_bytes > min(most_bytes, size - _LENGTH_BYTES):
            raise ArtifactRefused(f"{path}: its header is too large")
        text = file.read(header_bytes)
    try:
        return parse_object(text), header_bytes
    except ValueError:
        raise ArtifactRefused(f"{path}: its header is not a JSON object") from None


def _are_integers(value: Any) -> bool:
    # `isinstance` would accept True and False as integers.
    return isinstance(value, list) and all(type(number) is int for number in value)


def _does_not_fit(path: Path) -> ArtifactRefused:
    return ArtifactRefused(f"{path}: its data do not fit its shapes")
