"""Rebuild the config.json of a student from the fields that its family has.

transformers reads many more fields from a configuration: code to run, kernels to fetch, adapters,
other files of weights, quantization. None of them comes in, because the configuration is written
anew from checked fields alone.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from post_dist.artifacts.strict_json import read_object
from post_dist.errors import ArtifactRefused

_FAMILIES = frozenset(
    (
        *("bert", "bloom", "camembert", "cohere", "falcon", "gemma", "gemma2", "gemma3_text"),
        *("glm", "glm4", "gpt2", "gpt_neox", "gptj", "helium", "llama", "mistral", "mpt"),
        *("olmo", "olmo2", "olmo3", "opt", "phi", "phi3", "qwen2", "qwen3", "roberta"),
        *("seed_oss", "smollm3", "stablelm", "starcoder2", "xlm-roberta"),
        *("deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "mixtral", "olmoe", "phimoe"),
        *("qwen2_moe", "qwen3_moe"),
    )
)
"""Families whose code is part of transformers. The last ones are mixtures of experts."""

_READ_WITHOUT_DEFAULT = {"head_dim": 1}
"""Fields that some models read, though their configuration does not declare them."""

_DTYPES = ("float32", "bfloat16", "float16")
_LAYER_COUNT = re.compile(r"(num_hidden_layers|n_layers?|num_layers|max_window_layers)")
_MOST_LAYERS = 512
_LARGEST = 1 << 31
_MOST_ENTRIES = 4096
_WORD = re.compile(r"[A-Za-z0-9_.\-]{0,64}")


def is_known_family(model_type: str) -> bool:
    """Return whether an owner's checks take a student of a family."""
    return model_type in _FAMILIES


def rebuild_config(path: Path) -> None:
    """Check a config.json and replace it by one that holds the known fields alone.

    Args:
        path: the file, in a folder of our own.

    Raises:
        ArtifactRefused: the family is not known, or a field has another type or size than a model
            of this family can have.
    """
    fields = read_object(path)
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise ArtifactRefused(
            "config.json: its model_type is not a known family",
            f"students may be of the families {', '.join(sorted(_FAMILIES))}",
        )
    defaults = _READ_WITHOUT_DEFAULT | CONFIG_MAPPING[family]().to_dict()
    # The fields of the family itself, without those that every configuration has.
    own = set(defaults) - set(PretrainedConfig().to_dict())
    rebuilt = {"model_type": family, "architectures": [_architecture(fields, family)]}
    for name in sorted(own & set(fields)):
        rebuilt[name] = _checked(name, fields[name], defaults[name])
    dtype = fields.get("dtype", "float32")
    if dtype not in _DTYPES:
        raise ArtifactRefused(f"config.json: dtype is not one of {', '.join(_DTYPES)}")
    rebuilt["dtype"] = dtype
    path.write_text(json.dumps(rebuilt, indent=2) + "\n")


def _architecture(fields: Mapping[str, Any], family: str) -> str:
    """Return the class of the model, which must be the language model of its family."""
    known = {
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family),
        MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(family),
    }
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ArtifactRefused("config.json: architectures does not name one class")
    if names[0] not in known - {None}:
        raise ArtifactRefused(f"config.json: architectures is not a language model of {family}")
    return names[0]


def _checked(name: str, value: Any, default: Any) -> Any:
    """Return a field's value, if it has the type of the default and a size that models have."""
    if isinstance(value, dict) and isinstance(default, dict):
        if len(value) <= _MOST_ENTRIES and all(map(_is_entry, value, value.values())):
            return value
    elif name.endswith("_token_id"):
        # Some models end a text with several tokens, whatever the default of their family is.
        ids = value if isinstance(value, list) else [value]
        if len(ids) <= _MOST_ENTRIES and all(map(_is_token, ids)):
            return value
    elif isinstance(value, list) and isinstance(default, list):
        if len(value) <= _MOST_ENTRIES and all(map(_is_scalar, value)):
            return value
    elif _LAYER_COUNT.fullmatch(name):
        if type(value) is int and 0 < value <= _MOST_LAYERS:
            return value
    elif _is_scalar(value) and _has_type_of(value, default):
        return value
    raise ArtifactRefused(f"config.json: {name} has a value that no student needs")


def _is_entry(name: str, value: Any) -> bool:
    """Return whether an entry of a mapping, such as the rotary parameters, is plain."""
    if isinstance(value, dict):
        return _WORD.fullmatch(name) is not None and all(map(_is_entry, value, value.values()))
    values = value if isinstance(value, list) else [value]
    plain = len(values) <= _MOST_ENTRIES and all(map(_is_scalar, values))
    return _WORD.fullmatch(name) is not None and plain


def _is_token(value: Any) -> bool:
    """Return whether a value is a token id, or None for no token."""
    return value is None or (type(value) is int and abs(value) <= _LARGEST)


def _is_scalar(value: Any) -> bool:
    """Return whether a value is None, a boolean, a short word, or a number of a sensible size."""
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    if isinstance(value, int | float):
        return math.isfinite(value) and abs(value) <= _LARGEST
    return value is None


def _has_type_of(value: Any, default: Any) -> bool:
    """Return whether a value has the type of a default; None stands for any type."""
    if value is None or default is None:
        return True
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return isinstance(value, type(default))
