"""Load models and tokenizers from a folder or the hub.

Weights come only from safetensors files. No remote code is run. No weight is left at random values.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
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
from post_dist.errors import EnvironmentFault, InputError, first_line
from post_dist.files import digest_of, file_digests
from post_dist.models.families import is_masked
from post_dist.models.language_model import LanguageModel
from post_dist.models.model_checks import check_config, check_split
from post_dist.models.quantized import dequantizer
from post_dist.models.weight_files import check_tied, weight_files
from post_dist.paths import kind_of, reading
from post_dist.runtime.precision import DTYPES

log = logging.getLogger(__name__)

# Set here, because the import of transformers sets its own level.
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

# Otherwise the tokenizers library warns when a process forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_WEIGHTS_SUFFIX = ".safetensors"
_MODEL_FILES = [f"*{_WEIGHTS_SUFFIX}", "*.json", "*.txt", "*.model"]
"""Files that are downloaded of a hub model: weights, configuration and tokenizer, no pickles."""

PROBES = (
    "Review: a film, it was great",
    "L'été 1998, naïve 東京",
    "  two  spaces\nand\ttabs",
    "0123456789 @#$%",
)
"""Texts that two tokenizers with the same vocabulary may split differently."""

_LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)
"""Errors that transformers raises for broken weights, or for a configuration that does not fit."""


@dataclass(frozen=True)
class ModelSettings:
    """Settings with which a model is created.

    Attributes:
        config: the model's own configuration.
        auto_class: class of transformers for causal or for masked language models.
        masked: whether the model is a masked language model.
        arguments: keyword arguments for `from_pretrained` or `from_config`.
    """

    config: PretrainedConfig
    auto_class: Any
    masked: bool
    arguments: dict[str, Any]


def model_folder(teacher: Teacher, *, is_here: bool = False) -> Path:
    """Return the folder of a model. A hub model is downloaded once, without pickles.

    Args:
        teacher: the section of the run file.
        is_here: another process has downloaded the model to this node, so the hub is not asked.

    Raises:
        EnvironmentFault: the hub cannot be reached.
    """
    return _local_folder(teacher, _MODEL_FILES, is_here=is_here)


def model_name(folder: Path, section: Teacher | None = None) -> str:
    """Return the name of a model for others to read. The path to it would describe this machine.

    It is the hub name, or that of the folder. The artifact of a run is named by its run folder,
    such as `distill-1a2b3c4d`.

    Args:
        folder: the model's folder.
        section: the section of the run file that names the model, if there is one.
    """
    if section is not None and not Path(section.path).is_absolute():
        return section.path
    return folder.parent.name if folder.name == "artifact" else folder.name


def config_folder(teacher: Teacher) -> Path:
    """Return the folder of a model's config.json. Nothing else of a hub model is downloaded.

    Raises:
        EnvironmentFault: the hub cannot be reached.
    """
    return _local_folder(teacher, ["config.json"])


def _local_folder(teacher: Teacher, hub_files: list[str], *, is_here: bool = False) -> Path:
    """Return the folder of a model. Of a hub model, download the files `hub_files`."""
    # Loading the run file makes the path of a folder absolute, so other paths are hub names.
    if Path(teacher.path).is_absolute():
        return Path(teacher.path)

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            teacher.path,
            revision=teacher.revision,
            allow_patterns=hub_files,
            local_files_only=is_here,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise EnvironmentFault(
            f"cannot fetch {teacher.path} from the hub: {error}", "give a folder instead"
        ) from None
    return Path(folder)


def tokenizer_folder(teacher: Teacher) -> Path:
    """Return the folder of a model's config.json and tokenizer. Only these are downloaded.

    Raises:
        EnvironmentFault: the hub cannot be reached.
    """
    tokenizer = ["tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt"]
    return _local_folder(teacher, ["config.json", *tokenizer])


def check_is_model(folder: Path) -> None:
    """Check that a folder holds a model: its weights and a usable config.json.

    Raises:
        InputError: it does not.
    """
    check_has_weights(folder)
    read_config(folder)


def check_has_weights(folder: Path) -> None:
    """Check that a folder holds a model's weights.

    Raises:
        InputError: it does not, or is no folder.
    """
    check_is_folder(folder)
    weight_files(folder)


def read_config(folder: Path) -> PretrainedConfig:
    """Read the config.json of a folder that may lack weights.

    Raises:
        InputError: there is no usable config.json.
    """
    check_is_folder(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} has no usable config.json: {first_line(error)}") from None


def check_is_folder(folder: Path) -> None:
    """Check that a path is a folder.

    Raises:
        InputError: it is something else, or missing.
    """
    if kind_of(folder) != "folder":
        raise InputError(f"{folder} is not a folder", "give a model folder in Hugging Face format")


def weights_digest(files: Mapping[str, str]) -> str:
    """Return a digest of a model's weights.

    Copies of a model, such as one of the hub, may differ in other files.

    Args:
        files: sha256 of the model's files, or of its weights alone, by name.
    """
    return digest_of(sorted(files[name] for name in files if name.endswith(_WEIGHTS_SUFFIX)))


def weights_of(folder: Path) -> str:
    """Return the `weights_digest` of a model, from its weights alone.

    Raises:
        InputError: a file cannot be read.
    """
    with reading(folder):
        return weights_digest(file_digests(folder, f"*{_WEIGHTS_SUFFIX}"))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Raises:
        InputError: there is no usable tokenizer.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        return tokenizer
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} has no usable tokenizer: {first_line(error)}") from None


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest that is equal only for equal tokenizers.

    It covers the vocabulary, the special tokens, and the tokens of a few texts.
    """
    # Sorted, because the order of a vocabulary can change from load to load.
    facts = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": sorted(tokenizer.all_special_ids),
        "probes": [tokenizer(probe).input_ids for probe in PROBES],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def model_settings(folder: Path, precision: Precision, device: torch.device) -> ModelSettings:
    """Choose the settings with which the model in a folder is created.

    Args:
        folder: folder of the model in Hugging Face format.
        precision: precision of the weights.
        device: the device that the model will run on.

    Raises:
        InputError: the folder does not hold a model, or one of a kind that post_dist cannot use.
    """
    check_has_weights(folder)
    config = read_config(folder)
    check_config(config)
    masked = is_masked(config)
    # On a CPU, fused attention in bf16 has a backward pass six times slower than plain matrix
    # products (measured with a batch of 16 x 40). On other devices transformers chooses: fused
    # attention in families that have it, so not in Gemma 2 and BLOOM.
    attention = "eager" if device.type == "cpu" else None
    return ModelSettings(
        config=config,
        auto_class=AutoModelForMaskedLM if masked else AutoModelForCausalLM,
        masked=masked,
        arguments={
            "dtype": DTYPES[precision],
            "attn_implementation": attention,
            "trust_remote_code": False,
        },
    )


def load_whole(folder: Path, precision: Precision, device: torch.device) -> LanguageModel:
    """Load a frozen model in evaluation mode onto one device, without shards.

    Args:
        folder: folder of the model in Hugging Face format.
        precision: precision of the weights.
        device: the device that the model will run on.

    Raises:
        InputError: the model cannot be loaded, or weights are missing.
    """
    settings = model_settings(folder, precision, device)
    arguments = dict(settings.arguments)
    quantizer = dequantizer(folder, settings.config)
    if quantizer is not None:
        arguments["quantization_config"] = quantizer.quantization_config
    # The report lists the weights that are missing in all files.
    try:
        model, report = settings.auto_class.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **arguments,
        )
    except _LOADING_ERRORS as error:
        raise InputError(f"{folder} cannot be loaded: {first_line(error)}") from None
    check_none_missing(folder, report["missing_keys"])
    # transformers has compared tied weights, and no longer lists those that it did not tie.
    of_config = model.get_expanded_tied_weights_keys(all_submodels=True)
    untied = {one: of_config[one] for one in of_config.keys() - model.all_tied_weights_keys.keys()}
    check_tied(folder, untied)
    language_model = LanguageModel(model, masked=settings.masked)
    language_model = language_model.eval().to(device).requires_grad_(False)
    check_split(language_model)
    return language_model


def check_none_missing(folder: Path, missing: set[str]) -> None:
    """Check that no weight of a model is missing in its folder.

    Raises:
        InputError: weights are missing. They would keep random values.
    """
    if missing:
        raise InputError(
            f"{folder} lacks weights, such as {min(missing)}",
            "get the whole model; missing weights would keep random values",
        )
