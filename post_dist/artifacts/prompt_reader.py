"""Read the files of a soft prompt. They are not trusted, so each file is checked before its use.

Shapes: n prompt tokens, d width, C classes.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.task import PromptTask
from post_dist.errors import ArtifactRefused

KEY = "prompt_embeddings"
"""Name of the prompt's only tensor in PEFT's file."""
MAX_VIRTUAL_TOKENS = 512

_SMALL_FILE_BYTES = 1 << 16
"""A JSON file or a safetensors header above this size is refused before it is parsed."""
_HEADER_LENGTH_BYTES = 8
"""A safetensors file starts with the length of its header, as an unsigned 64-bit number."""
_DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_PROMPT_DIMENSIONS = {KEY: 2}
_HEAD_DIMENSIONS = {"bias": 1, "mean": 1, "scale": 1, "weight": 2}
"""Number of dimensions of each tensor in a file."""
_NORM_LIMIT = 1e4
"""Largest Euclidean norm of a prompt vector. Embeddings of the known model families stay below 100.
"""
_LEAST_SCALE = 1e-9
_LENGTH_LIMIT = 1 << 20
"""Most tokens of a text or a response; no known model reads more."""
_JSON_ERRORS = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)
"""Errors that hostile JSON, or fields of the wrong type, may cause."""


def read_embeddings(path: Path) -> torch.Tensor:
    """Read the prompt embeddings [n, d] in fp32 from a safetensors file.

    Raises:
        ArtifactRefused: wrong size, header, dtype or shape; values that are not finite or far too
            large.
    """
    embeddings_nd = _read_tensors(path, _PROMPT_DIMENSIONS)[KEY].float()
    if len(embeddings_nd) > MAX_VIRTUAL_TOKENS:
        raise ArtifactRefused(
            f"{path}: has {len(embeddings_nd)} prompt tokens, more than {MAX_VIRTUAL_TOKENS}"
        )
    if embeddings_nd.norm(dim=1).max() > _NORM_LIMIT:
        raise ArtifactRefused(f"{path} holds a vector with a norm above {_NORM_LIMIT:g}")
    return embeddings_nd


def read_head(path: Path, width: int, num_classes: int) -> LinearHead:
    """Read a linear head from a safetensors file.

    Args:
        path: the file.
        width: width d of the prompt that it belongs to.
        num_classes: number of classes C of its task.

    Raises:
        ArtifactRefused: wrong size, header, dtype or shape; values that are not finite or far too
            large; a scale that is too small.
    """
    tensors = _read_tensors(path, _HEAD_DIMENSIONS)
    head = LinearHead(**{name: tensor.double() for name, tensor in tensors.items()})
    fits = head.weight.shape == (num_classes, width) and len(head.bias) == num_classes
    if not fits or len(head.mean) != width or len(head.scale) != width:
        raise ArtifactRefused(f"{path} does not fit {num_classes} classes and width {width}")
    if head.scale.min() < _LEAST_SCALE:
        raise ArtifactRefused(f"{path} holds a scale below {_LEAST_SCALE:g}")
    if max(value.abs().max() for value in tensors.values()) > _NORM_LIMIT:
        raise ArtifactRefused(f"{path} holds a value above {_NORM_LIMIT:g}")
    return head


def read_privacy(path: Path) -> dict[str, Any]:
    """Read the privacy statement of a prompt.

    Raises:
        ArtifactRefused: it is too large, is not a JSON object, or has no usable epsilon.
    """
    try:
        fields = _read_small_json(path)
        epsilon = fields["epsilon"]
        # Python's JSON parser accepts Infinity, and `isinstance` would accept True as a number.
        if epsilon is not None and type(epsilon) not in (int, float):
            raise ValueError("epsilon is not a number")
        if epsilon is not None and not 0 <= float(epsilon) < math.inf:
            raise ValueError("epsilon is out of range")
        return dict(fields)
    except _JSON_ERRORS:
        raise ArtifactRefused(f"{path} is not a privacy statement") from None


def read_task(path: Path) -> PromptTask:
    """Read the task of a prompt.

    Raises:
        ArtifactRefused: it is too large, is not a JSON object, or a field has the wrong type.
    """
    try:
        fields = _read_small_json(path)
        # JSON has only lists. The task needs tuples, because it is compared and hashed.
        words_of_classes = [[str(word) for word in words] for words in fields["label_words"]]
        fields["label_words"] = tuple(map(tuple, words_of_classes))
        fields["class_biases"] = tuple(map(float, fields.get("class_biases", ())))
        task = PromptTask(**fields)
        if not (_has_sound_texts(task) and _has_sound_answers(task)):
            raise ValueError("a field has the wrong type")
        return task
    except _JSON_ERRORS:
        raise ArtifactRefused(f"{path} is not a task description") from None


def _has_sound_texts(task: PromptTask) -> bool:
    """Return whether template, initial text and length have the right type and are usable."""
    has_texts = isinstance(task.template, str) and isinstance(task.init_text, str)
    has_length = type(task.max_length) is int and 0 < task.max_length <= _LENGTH_LIMIT
    return has_texts and has_length and task.init_text.strip() != ""


def _has_sound_answers(task: PromptTask) -> bool:
    """Return whether the fields of classes and response have the right types and agree."""
    # `isinstance` would accept True and False as integers, so `type` is compared.
    if type(task.allow_multi_token) is not bool or type(task.max_response_length) is not int:
        return False
    if not 0 <= task.max_response_length <= _LENGTH_LIMIT:
        return False
    has_classes = len(task.label_words) >= 2
    generates = task.max_response_length > 0
    one_bias_a_class = len(task.class_biases) in (0, len(task.label_words))
    # This also refuses NaN, because a comparison with NaN is false.
    small_biases = all(abs(bias) < _NORM_LIMIT for bias in task.class_biases)
    return has_classes != generates and one_bias_a_class and small_biases


def _read_small_json(path: Path) -> Any:
    if path.stat().st_size > _SMALL_FILE_BYTES:
        raise ValueError("too large")
    return json.loads(path.read_text())


def _read_tensors(path: Path, dimensions: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file.

    Args:
        path: the file.
        dimensions: number of dimensions of each tensor that the file must hold.

    Raises:
        ArtifactRefused: the file holds anything else, or values that are not finite.
    """
    # Only a file with a valid header is passed to the library.
    _check_header(path, dimensions)
    tensors = load_file(path)
    for tensor in tensors.values():
        if not torch.isfinite(tensor).all():
            raise ArtifactRefused(f"{path} holds values that are not finite")
    return tensors


def _check_header(path: Path, dimensions: Mapping[str, int]) -> None:
    """Check size, header and shapes before a library allocates memory for them."""
    header, header_bytes = _read_header(path)
    header.pop("__metadata__", None)  # such as the framework that wrote the file
    names = ", ".join(dimensions)
    # The library would load any other tensor as well.
    if set(header) != set(dimensions):
        raise ArtifactRefused(f"{path}: does not hold {names} alone")
    spans = []
    for name, count in dimensions.items():
        spans.append(_span(path, header[name], count))
    # The tensors must fill the file behind the header, without a gap and without overlap.
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise ArtifactRefused(f"{path}: its data do not fit its shapes")
        end = last
    if path.stat().st_size != _HEADER_LENGTH_BYTES + header_bytes + end:
        raise ArtifactRefused(f"{path}: its data do not fit its shapes")


def _span(path: Path, entry: Any, dimensions: int) -> tuple[int, int]:
    """Check the entry of one tensor in a header, and return the first and last of its bytes."""
    try:
        dtype = entry["dtype"]
        shape = entry["shape"]
        offsets = entry["data_offsets"]
    except (TypeError, KeyError):
        raise ArtifactRefused(f"{path}: has a tensor without dtype, shape or place") from None
    # A hostile dtype may be a list, which cannot be looked up in a dictionary.
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        known = ", ".join(_DTYPE_BYTES)
        raise ArtifactRefused(f"{path}: has dtype {str(dtype)[:20]}, not one of {known}")
    if not _is_shape(shape, dimensions):
        raise ArtifactRefused(f"{path}: has a tensor without {dimensions} dimensions")
    sound = isinstance(offsets, list) and len(offsets) == 2 and type(offsets[0]) is int
    if not sound or offsets[1] != offsets[0] + math.prod(shape) * _DTYPE_BYTES[dtype]:
        raise ArtifactRefused(f"{path}: its data do not fit its shapes")
    return offsets[0], offsets[1]


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file and its length in bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_HEADER_LENGTH_BYTES)
        if len(start) < _HEADER_LENGTH_BYTES:
            raise ArtifactRefused(f"{path}: is not a safetensors file")
        (header_bytes,) = struct.unpack("<Q", start)
        if header_bytes > min(_SMALL_FILE_BYTES, size - _HEADER_LENGTH_BYTES):
            raise ArtifactRefused(f"{path}: its header is too large")
        text = file.read(header_bytes)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ArtifactRefused(f"{path}: its header is not a JSON object")
    return header, header_bytes


def _is_shape(shape: Any, dimensions: int) -> bool:
    if not isinstance(shape, list) or len(shape) != dimensions:
        return False
    return all(type(length) is int and length > 0 for length in shape)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, and refuse duplicate keys. Parsers differ in which of them they use."""
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)
