"""Models and tokenizers from a folder or the hub: safetensors alone, no code from outside, nothing left random."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from post_dist.config.precision import Precision
from post_dist.config.schema import Teacher
from post_dist.errors import EnvironmentFault, InputError
from post_dist.models.language_model import LanguageModel, check_split

log = logging.getLogger(__name__)
transformers_logging.set_verbosity_error()  # here, for its import sets its own
transformers_logging.disable_progress_bar()

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PROBES = (
    "Review: a film, it was great",
    "L'été 1998, naïve 東京",
    "  two  spaces\nand\ttabs",
    "0123456789 @#$%",
)


def model_folder(teacher: Teacher) -> Path:
    """The folder of a model; a hub model is fetched once, without pickles.

    Raises:
        EnvironmentFault: the hub cannot be reached.
    """
    if Path(teacher.path).is_absolute():
        return Path(teacher.path)
    return _fetched(teacher, ["*.safetensors", "*.json", "*.txt", "*.model"])


def _fetched(teacher: Teacher, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(teacher.path, revision=teacher.revision, allow_patterns=patterns)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise EnvironmentFault(
            f"teacher.path: cannot fetch {teacher.path}: {error}", "give a folder instead"
        ) from None


def config_folder(teacher: Teacher) -> Path:
    """The folder of a model's config.json; of a hub model nothing else is fetched.

    Raises:
        EnvironmentFault: the hub cannot be reached.
    """
    return (
        Path(teacher.path)
        if Path(teacher.path).is_absolute()
        else _fetched(teacher, ["config.json"])
    )


def tokenizer_folder(teacher: Teacher) -> Path:
    """Return the folder of a model's config.json and tokenizer, fetching only these from the hub.

    Raises:
        EnvironmentFault: the hub cannot be reached.
    """
    if Path(teacher.path).is_absolute():
        return Path(teacher.path)
    tokenizer = ["tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt"]
    return _fetched(teacher, ["config.json", *tokenizer])


def load_config(folder: Path) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        InputError: the folder is not a model's.
    """
    _check_is_folder(folder)
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} has no safetensors weights",
            "convert the model with save_pretrained; pickles are not loaded",
        )
    return read_config(folder)


def read_config(folder: Path) -> PretrainedConfig:
    """The same where no weights need be.

    Raises:
        InputError: there is no usable config.json.
    """
    _check_is_folder(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} has no usable config.json: {_first_line(error)}") from None


def _check_is_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder", "give a model folder in Hugging Face format")


def is_masked(config: PretrainedConfig) -> bool:
    """Whether a model fills in masks, by the architecture that its configuration names."""
    return any(name.endswith("ForMaskedLM") for name in config.architectures or [])


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        InputError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} has no usable tokenizer: {_first_line(error)}") from None


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of the vocabulary, the special tokens and how a few texts are cut: equal only for equal tokenizers."""
    facts = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": sorted(tokenizer.all_special_ids),
        "probes": [tokenizer(probe).input_ids for probe in _PROBES],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def model_settings(
    folder: Path, precision: Precision, device: torch.device
) -> tuple[Any, bool, dict[str, Any]]:
    """How a model is made: the class of its family, whether it is masked, and the dtype and attention for a device."""
    masked = is_masked(load_config(folder))
    # On a CPU the backward of fused attention in bf16 is six times slower than plain products (measured, batch 16 x 40). Elsewhere
    # transformers chooses: fused where the family has it, which Gemma 2 and BLOOM have not.
    attention = "eager" if device.type == "cpu" else None
    family = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    return (
        family,
        masked,
        {"dtype": _DTYPES[precision], "attn_implementation": attention, "trust_remote_code": False},
    )


def load_whole(folder: Path, precision: Precision, device: torch.device) -> LanguageModel:
    """A frozen model in evaluation mode, whole, on one device.

    Raises:
        InputError: it cannot be loaded, or weights are missing.
    """
    family, masked, settings = model_settings(folder, precision, device)
    try:
        model, report = family.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **settings,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded: {_first_line(error)}") from None
    if report["missing_keys"]:
        raise InputError(
            f"{folder} lacks weights, such as {min(report['missing_keys'])}",
            "they would be left random",
        )
    language_model = LanguageModel(model, masked=masked).eval().to(device).requires_grad_(False)
    check_split(language_model)
    return language_model


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


os.environ.setdefault(
    "TOKENIZERS_PARALLELISM", "false"
)  # the tokenizers library warns when a process forks
