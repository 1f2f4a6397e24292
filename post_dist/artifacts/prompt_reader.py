"""Read the files of a soft prompt. They are not trusted, so each file is checked before its use.

Shapes: n prompt tokens, d width, C classes.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.peft_format import LAYER_LIMIT, NAMED_FIELDS, PROMPT_EMBEDDINGS
from post_dist.artifacts.strict_json import SMALL_FILE_BYTES, read_small
from post_dist.artifacts.task import PromptTask
from post_dist.artifacts.tensor_file import read_layout, read_tensors
from post_dist.config.label_names import label_fault
from post_dist.config.sections import steers_terminal
from post_dist.config.sources import has_places
from post_dist.errors import ArtifactRefused

MAX_VIRTUAL_TOKENS = 512

_PROMPT_DIMENSIONS = {PROMPT_EMBEDDINGS: 2}
_HEAD_DIMENSIONS = {"bias": 1, "mean": 1, "scale": 1, "weight": 2}
"""Number of dimensions of each tensor in a file."""
_HEAD_PLACE = {"above": 1}
"""The tensor that only a head below the last layers has."""
_NORM_LIMIT = 1e4
"""Largest Euclidean norm of a prompt vector. Embeddings of the known model families stay below 100.
"""
_BIAS_LIMIT = 100.0
"""Largest bias of a class score. A class with another 100 nats is chosen whatever the text says."""
_STATE_LIMIT = 1e6
"""Largest mean or scale of a hidden state. Inner layers of some families reach 100,000."""
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
    embeddings_nd = _read_known(path, _PROMPT_DIMENSIONS)[PROMPT_EMBEDDINGS].float()
    if len(embeddings_nd) > MAX_VIRTUAL_TOKENS:
        raise ArtifactRefused(
            f"{path} has {len(embeddings_nd)} prompt tokens, more than {MAX_VIRTUAL_TOKENS}"
        )
    if embeddings_nd.norm(dim=1).max() > _NORM_LIMIT:
        raise ArtifactRefused(f"{path} holds a vector with a norm above {_NORM_LIMIT:g}")
    return embeddings_nd


def read_head(path: Path, width: int, num_classes: int) -> LinearHead:
    """Read a linear head from a safetensors file.

    Args:
        path: the file.
        width: width of the prompt that it belongs to. A head of several layers reads a multiple.
        num_classes: number of classes C of its task.

    Raises:
        ArtifactRefused: wrong size, header, dtype or shape; values that are not finite or far too
            large; a scale that is too small.
    """
    tensors = _read_known(path, _HEAD_DIMENSIONS, optional=_HEAD_PLACE)
    above = tensors.get("above")
    if above is not None and (len(above) != 1 or above.item() not in range(LAYER_LIMIT)):
        raise ArtifactRefused(f"{path}: above is not a number of layers below {LAYER_LIMIT}")
    head = LinearHead.of_tensors(tensors)
    features = width * max(1, head.depth(width))
    fits = head.weight.shape == (num_classes, features) and len(head.bias) == num_classes
    if not fits or len(head.mean) != features or len(head.scale) != features:
        raise ArtifactRefused(f"{path} does not fit {num_classes} classes and width {width}")
    if head.scale.min() < _LEAST_SCALE:
        raise ArtifactRefused(f"{path} holds a scale below {_LEAST_SCALE:g}")
    if max(head.weight.abs().max(), head.bias.abs().max()) > _NORM_LIMIT:
        raise ArtifactRefused(f"{path} holds a value above {_NORM_LIMIT:g}")
    if max(head.mean.abs().max(), head.scale.max()) > _STATE_LIMIT:
        raise ArtifactRefused(f"{path} holds a mean or scale above {_STATE_LIMIT:g}")
    return head


def check_adapter_config(path: Path, embeddings_nd: torch.Tensor) -> None:
    """Check that PEFT's configuration describes a soft prompt of these embeddings and no more.

    Args:
        path: the file.
        embeddings_nd: the prompt.

    Raises:
        ArtifactRefused: a field asks PEFT for anything else, such as another adapter or a file.
    """
    try:
        fields = read_small(path)
        num_virtual_tokens, width = embeddings_nd.shape
        sizes = {"num_virtual_tokens": num_virtual_tokens, "token_dim": width}
        wanted = sizes | {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
        for name, value in fields.items():
            if name in wanted:
                sound = type(value) is type(wanted[name]) and value == wanted.pop(name)
            else:
                sound = value is None or isinstance(value, NAMED_FIELDS.get(name, ()))
            if not sound:
                raise ValueError(name)
        if wanted:
            raise ValueError("a field is missing")
    except _JSON_ERRORS:
        raise ArtifactRefused(
            f"{path} is not the configuration of a soft prompt of {len(embeddings_nd)} tokens"
        ) from None


def read_privacy(path: Path) -> dict[str, Any]:
    """Read the privacy statement of a prompt.

    Raises:
        ArtifactRefused: it is too large, is not a JSON object, or has no usable epsilon.
    """
    try:
        fields = read_small(path)
        epsilon = fields["epsilon"]
        # Python's JSON parser accepts Infinity, and `isinstance` would accept True as a number.
        if epsilon is not None and type(epsilon) not in (int, float):
            raise ValueError("epsilon is not a number")
        if epsilon is not None and not 0 <= float(epsilon) < math.inf:
            raise ValueError("epsilon is out of range")
        return fields
    except _JSON_ERRORS:
        raise ArtifactRefused(f"{path} is not a privacy statement") from None


def read_task(path: Path) -> PromptTask:
    """Read the task of a prompt.

    Raises:
        ArtifactRefused: it is too large, is not a JSON object, or a field has the wrong type.
    """
    try:
        fields = read_small(path)
        # JSON has only lists. The task needs tuples, because it is compared and hashed.
        fields["label_words"] = tuple(map(_words, fields["label_words"]))
        fields["class_biases"] = tuple(map(float, fields.get("class_biases", ())))
        fields["label_names"] = _label_names(fields.get("label_names", []))
        task = PromptTask(**fields)
        if not (_has_sound_texts(task) and _has_sound_answers(task)):
            raise ValueError("a field has the wrong type")
        return task
    except _JSON_ERRORS:
        raise ArtifactRefused(f"{path} is not a task description") from None


def _words(words: Any) -> tuple[str, ...]:
    """Return the label words of a class. A text in their place would be read as its letters."""
    if not isinstance(words, list) or not words:
        raise ValueError("not a list of words")
    for word in words:
        if not isinstance(word, str) or not word.strip() or steers_terminal(word):
            raise ValueError("not a word")
    return tuple(words)


def _label_names(names: Any) -> tuple[str, ...]:
    """Return the names of the classes, which are printed beside the predictions."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("not a list of names")
    if any(map(label_fault, names)) or len(set(names)) < len(names):
        raise ValueError("not a name of its own for each class")
    return tuple(names)


def _has_sound_texts(task: PromptTask) -> bool:
    """Return whether template, initial text and length have the right type and are usable."""
    if not isinstance(task.template, str) or not isinstance(task.init_text, str):
        return False
    has_length = type(task.max_length) is int and 0 < task.max_length <= _LENGTH_LIMIT
    texts = task.template + task.init_text
    # A lone surrogate could not be printed or tokenized.
    texts.encode()
    is_plain = not steers_terminal(texts, lines=True)
    return has_places(task.template) and has_length and is_plain and task.init_text.strip() != ""


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
    one_name_a_class = len(task.label_names) in (0, len(task.label_words))
    # This also refuses NaN, because a comparison with NaN is false.
    small_biases = all(abs(bias) < _BIAS_LIMIT for bias in task.class_biases)
    "".join(word for words in task.label_words for word in words).encode()
    fits_classes = one_bias_a_class and one_name_a_class
    return has_classes != generates and fits_classes and small_biases


def _read_known(
    path: Path, dimensions: Mapping[str, int], optional: Mapping[str, int] = MappingProxyType({})
) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file.

    Args:
        path: the file.
        dimensions: number of dimensions of each tensor that the file must hold.
        optional: the same of tensors that it may hold.

    Raises:
        ArtifactRefused: the file holds anything else, or values that are not finite.
    """
    # Only a file with a valid header is passed to the library.
    layouts = read_layout(path, SMALL_FILE_BYTES)
    # The library would load any other tensor as well.
    if set(layouts) - set(optional) != set(dimensions):
        names = ", ".join([*dimensions, *(f"perhaps {name}" for name in optional)])
        raise ArtifactRefused(f"{path} does not hold {names} alone")
    known = {**dimensions, **optional}
    for name, layout in layouts.items():
        count = known[name]
        if len(layout.shape) != count:
            raise ArtifactRefused(f"{path} has a tensor without {count} dimensions")
    return read_tensors(path)
