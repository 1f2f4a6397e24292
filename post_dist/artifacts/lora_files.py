"""Read and write a LoRA in PEFT's format. The files are not trusted."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from post_dist.artifacts.lora import DOWN, UP, Lora
from post_dist.artifacts.peft_format import NAMED_FIELDS, VALUE_LIMIT
from post_dist.artifacts.strict_json import read_small
from post_dist.artifacts.tensor_file import TensorLayout, read_layout, read_tensors
from post_dist.errors import ArtifactRefused

_PREFIX = "base_model.model."
"""PEFT's name of the model that a LoRA changes."""
_NAME = re.compile(re.escape(_PREFIX) + r"([A-Za-z0-9_]+\.)+lora_[AB]\.weight")
_LARGEST_HEADER = 1 << 20
_MOST_RANK = 256
_MOST_ALPHA = 1 << 16
_WANTED: Mapping[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}
"""Fields that PEFT gives a value where nothing special was asked for."""
_EMPTY = ("null", "false", "{}", "[]")


def write_lora(weights: Path, config: Path, lora: Lora, about: Mapping[str, str]) -> None:
    """Write the two files that `PeftModel.from_pretrained` loads.

    Args:
        weights: the file for the factors.
        config: the file for PEFT's configuration.
        lora: the LoRA.
        about: fields of the configuration that say what the LoRA is for.
    """
    # PEFT's name of the whole model comes first in each name.
    tensors = {}
    for name, factor in lora.factors.items():
        tensors[_PREFIX + name] = factor.detach().to("cpu", torch.float32).contiguous()
    save_file(tensors, weights, metadata={"format": "pt"})
    fields = {
        "peft_type": "LORA",
        "bias": "none",
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        # Whole names, so that PEFT need not guess which layers are meant.
        "target_modules": lora.layers,
    }
    config.write_text(json.dumps({**fields, **about}, indent=2) + "\n")


def read_lora(weights: Path, config: Path) -> Lora:
    """Read a LoRA.

    Args:
        weights: the file with the factors.
        config: PEFT's configuration.

    Raises:
        ArtifactRefused: wrong size, header, name, dtype or shape; values that are not finite or far
            too large; or a configuration that asks PEFT for anything else.
    """
    # Only a file with the right names and shapes is passed to the library.
    rank = _check_layout(weights, read_layout(weights, _LARGEST_HEADER))
    tensors = read_tensors(weights)
    factors = {}
    for name in sorted(tensors):
        factors[name.removeprefix(_PREFIX)] = tensors[name].float()
    if max(float(factor.abs().max()) for factor in factors.values()) > VALUE_LIMIT:
        raise ArtifactRefused(f"{weights} holds a value above {VALUE_LIMIT:g}")
    # The configuration must say what the factors say, and it alone gives alpha.
    try:
        alpha = _alpha(read_small(config), Lora(factors, 1).layers, rank)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ArtifactRefused(
            f"{config} is not the configuration of this LoRA of rank {rank}"
        ) from None
    return Lora(factors, alpha)


def _check_layout(path: Path, layouts: Mapping[str, TensorLayout]) -> int:
    """Check that a file holds the two factors of each layer and no more; return their rank."""
    ranks = set()
    for name, layout in layouts.items():
        # Each name must have its partner, so no factor stands alone.
        is_down = name.endswith(DOWN)
        other = name.removesuffix(DOWN) + UP if is_down else name.removesuffix(UP) + DOWN
        if not _NAME.fullmatch(name) or other not in layouts or len(layout.shape) != 2:
            raise ArtifactRefused(f"{path} does not hold two factors of each layer alone")
        ranks.add(layout.shape[0 if is_down else 1])
    if len(ranks) != 1 or max(ranks) > _MOST_RANK:
        raise ArtifactRefused(f"{path}: its factors have no common rank up to {_MOST_RANK}")
    return ranks.pop()


def _alpha(fields: dict[str, Any], layers: list[str], rank: int) -> float:
    """Check PEFT's configuration, and return alpha.

    Raises:
        ValueError: a field asks PEFT for anything else than this LoRA.
        KeyError: a field is missing.
    """
    alpha = fields.pop("lora_alpha")
    targets = fields.pop("target_modules")
    found = (fields.pop("r"), fields["peft_type"], fields["bias"])
    # `isinstance` would accept True as a number.
    if type(alpha) not in (int, float) or not 0 < alpha <= _MOST_ALPHA:
        raise ValueError("lora_alpha")
    if found != (rank, "LORA", "none") or type(found[0]) is not int:
        raise ValueError("r")
    are_names = isinstance(targets, list) and all(isinstance(each, str) for each in targets)
    if not are_names or not _name_these(targets, layers):
        raise ValueError("target_modules")
    # All that is left must be what PEFT writes if nothing else was asked for.
    for name, value in fields.items():
        wanted = _WANTED.get(name)
        is_wanted = type(value) is type(wanted) and value == wanted
        is_name = isinstance(value, NAMED_FIELDS.get(name, ()))
        if not (is_wanted or is_name or json.dumps(value) in _EMPTY):
            raise ValueError(name)
    return alpha


def _name_these(targets: list[str], layers: list[str]) -> bool:
    """Return whether target modules name these layers and no others.

    PEFT takes whole names, and ends of names.
    """
    # A target without factors would make PEFT add a layer that nobody has tuned.
    named: set[str] = set()
    for target in targets:
        matches = {layer for layer in layers if f".{layer}".endswith(f".{target}")}
        if not matches:
            return False
        named |= matches
    return len(named) == len(layers)
