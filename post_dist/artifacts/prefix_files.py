"""Read and write a prefix in PEFT's format. The files are not trusted.

Shapes: L layers, n virtual tokens, h key heads, w width of a key and of a value.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from post_dist.artifacts.peft_format import (
    LAYER_LIMIT,
    NAMED_FIELDS,
    PROMPT_EMBEDDINGS,
    VALUE_LIMIT,
)
from post_dist.artifacts.prefix import Prefix, PrefixShape
from post_dist.artifacts.strict_json import SMALL_FILE_BYTES, read_small
from post_dist.artifacts.tensor_file import read_layout, read_tensors
from post_dist.errors import ArtifactRefused

_PEFT_TYPE = "PREFIX_TUNING"
PREFIX_LIMIT_BYTES = 255 << 20
"""Size limit of the keys and values. Their file may have 256 MiB."""
_JSON_ERRORS = (ValueError, TypeError, KeyError, RecursionError)
"""Errors that hostile JSON, or fields of the wrong type, may cause."""


def write_prefix(weights: Path, config: Path, prefix: Prefix, about: Mapping[str, str]) -> None:
    """Write the two files that `PeftModel.from_pretrained` loads.

    Args:
        weights: the file for the keys and values.
        config: the file for PEFT's configuration.
        prefix: the prefix.
        about: fields of the configuration that say what the prefix is for.
    """
    table = prefix.table().detach().to("cpu", torch.float32).contiguous()
    save_file({PROMPT_EMBEDDINGS: table}, weights, metadata={"format": "pt"})
    fields = {
        "peft_type": _PEFT_TYPE,
        "inference_mode": True,
        "num_virtual_tokens": prefix.num_virtual_tokens,
        "num_layers": prefix.shape.layers,
        # PEFT means the heads of keys, of which grouped-query attention has fewer.
        "num_attention_heads": prefix.shape.heads,
        "token_dim": prefix.shape.token_width,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        # PEFT has a width for its projection, also where there is none.
        "encoder_hidden_size": prefix.shape.token_width,
    }
    config.write_text(json.dumps({**fields, **about}, indent=2) + "\n")


def holds_prefix(config: Path) -> bool:
    """Return whether PEFT's configuration names a prefix. Any file may be given."""
    try:
        return read_small(config).get("peft_type") == _PEFT_TYPE
    except _JSON_ERRORS:
        return False


def read_prefix(weights: Path, config: Path, num_virtual_tokens: int) -> Prefix:
    """Read a prefix.

    Args:
        weights: the file with the keys and values.
        config: PEFT's configuration.
        num_virtual_tokens: number n of vectors of the prompt that the prefix started from.

    Raises:
        ArtifactRefused: wrong size, header, name, dtype or shape; values that are not finite or far
            too large; or a configuration that asks PEFT for anything else.
    """
    # Only a file with the right name and shape is passed to the library.
    layouts = read_layout(weights, SMALL_FILE_BYTES)
    if set(layouts) != {PROMPT_EMBEDDINGS} or len(layouts[PROMPT_EMBEDDINGS].shape) != 2:
        raise ArtifactRefused(f"{weights} does not hold one table of keys and values alone")
    rows, columns = layouts[PROMPT_EMBEDDINGS].shape
    if rows != num_virtual_tokens:
        raise ArtifactRefused(
            f"{weights} has {rows} virtual tokens, and the prompt that it started from has "
            f"{num_virtual_tokens}"
        )
    try:
        shape = _shape(read_small(config), rows, columns)
    except _JSON_ERRORS:
        raise ArtifactRefused(
            f"{config} is not the configuration of this prefix of {rows} virtual tokens"
        ) from None
    table = read_tensors(weights)[PROMPT_EMBEDDINGS].float()
    if float(table.abs().max()) > VALUE_LIMIT:
        raise ArtifactRefused(f"{weights} holds a value above {VALUE_LIMIT:g}")
    return Prefix.of_table(table, shape)


def _shape(fields: dict[str, Any], rows: int, columns: int) -> PrefixShape:
    """Check PEFT's configuration, and return the shape of the prefix.

    Args:
        fields: the configuration.
        rows: number of virtual tokens of the table.
        columns: number of values of each of them.

    Raises:
        ValueError: a field asks PEFT for anything else than this prefix.
        KeyError: a field is missing.
    """
    layers, heads, token_width = (
        _count(fields.pop(name)) for name in ("num_layers", "num_attention_heads", "token_dim")
    )
    if layers > LAYER_LIMIT or token_width % heads or 2 * layers * token_width != columns:
        raise ValueError("num_layers")
    if _count(fields.pop("num_virtual_tokens")) != rows or fields.pop("peft_type") != _PEFT_TYPE:
        raise ValueError("num_virtual_tokens")
    # All that is left must be what PEFT writes if nothing else was asked for.
    usual = {
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "encoder_hidden_size": token_width,
    }
    for name, value in fields.items():
        is_usual = name in usual and type(value) is type(usual[name]) and value == usual[name]
        if not (is_usual or value is None or isinstance(value, NAMED_FIELDS.get(name, ()))):
            raise ValueError(name)
    return PrefixShape(layers, heads, token_width // heads)


def _count(value: Any) -> int:
    """Return a number that is a whole one above zero."""
    # `isinstance` would accept True as a number.
    if type(value) is not int or value < 1:
        raise ValueError("not a number of anything")
    return value
