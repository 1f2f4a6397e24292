"""Load a frozen large model straight into ZeRO-3 shards.

No process ever holds more than its own shard and one whole weight. Under ZeRO-3, the loader of
transformers needs more than a whole model on rank 0. Here the model is created in shards. Then one
rank of a shard group reads each weight from the safetensors files. The weight is broadcast, and
sharded before the next one is read.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch

# pyrefly: ignore[missing-module-attribute]
from deepspeed.ops.op_builder import AsyncIOBuilder
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import prevent_arange_dtype_change

from post_dist.config.deepspeed import frozen_settings
from post_dist.config.precision import Precision
from post_dist.config.schema import Engine
from post_dist.errors import EnvironmentFault, InputError
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import check_none_missing, load_whole, model_settings
from post_dist.models.model_checks import check_no_scale
from post_dist.runtime.allocator import memory_given_back_at_once
from post_dist.runtime.distributed import World, prepare_deepspeed
from post_dist.runtime.gathering import gathered_from_reader
from post_dist.runtime.rank_layout import ShardGroup, shard_group
from post_dist.runtime.watchdog import phase
from post_dist.runtime.zero import freeze_sharded

log = logging.getLogger(__name__)


def load_sharded(folder: Path, engine: Engine, precision: Precision, world: World) -> LanguageModel:
    """Load a frozen model in ZeRO-3 shards.

    All ranks must call this. They must also run the model the same number of times.

    Args:
        folder: folder of the model in Hugging Face format, which every rank can read.
        engine: the shard group, offload and activation checkpointing.
        precision: precision of the weights.
        world: the ranks.

    Raises:
        InputError: weights are missing, do not fit, or cannot be read. Or the model is not one
            trunk with one head. Or this device does not support the settings of `engine`.
        EnvironmentFault: `offload: nvme` without libaio.
    """
    group = shard_group(engine, world)
    if engine.offload == "nvme" and not AsyncIOBuilder().is_compatible(verbose=False):
        raise EnvironmentFault(
            "engine.offload: nvme needs libaio, which is not installed",
            "install libaio-dev, or set engine.offload: cpu",
        )
    # A group of one rank keeps the model whole, unless it is the only rank and offloads.
    if group.size == 1 and (world.size > 1 or engine.offload == "none"):
        model = load_whole(folder, precision, world.device)
    else:
        prepare_deepspeed(world)
        model = _load_shards(folder, engine, precision, group, world.device)
    if engine.activation_checkpointing:
        model.checkpoint_activations()
    return model


def _load_shards(
    folder: Path, engine: Engine, precision: Precision, group: ShardGroup, device: torch.device
) -> LanguageModel:
    settings = model_settings(folder, precision, device)
    check_no_scale(settings.config)
    largest_shard = math.ceil(_largest_weight(folder) / group.size)
    zero_settings = frozen_settings(engine, precision, largest_shard)

    # `from_config` can open zero.Init itself, but only for all ranks and not for a group. The dtype
    # comes only from DeepSpeed's settings, because DeepSpeed 0.19.8 turns any argument `dtype` into
    # bf16 on a CPU.
    created_in_shards = deepspeed.zero.Init(
        data_parallel_group=group.process_group, config_dict_or_path=zero_settings
    )
    # Otherwise the heap would keep freed memory between shards. With 2 ranks, the measured peak
    # was then 2.6 shards instead of 1.5.
    with memory_given_back_at_once():
        with no_init_weights(), prevent_arange_dtype_change(), created_in_shards:
            model = settings.auto_class.from_config(settings.config, **settings.arguments)
        model.tie_weights()
        _fill(model, folder, reads=group.reads)
    language_model = LanguageModel(model, masked=settings.masked).eval()
    return freeze_sharded(language_model, zero_settings)


def _largest_weight(folder: Path) -> int:
    """Return the number of elements of the largest weight in the files."""
    largest = 0
    for file in folder.glob("*.safetensors"):
        with _reading(folder), safe_open(file, framework="pt") as weights:
            for name in weights.keys():
                largest = max(largest, math.prod(weights.get_slice(name).get_shape()))
    return largest


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Convert errors of broken files into an InputError that names the folder."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder} cannot be loaded: {error}") from None


def _fill(model: PreTrainedModel, folder: Path, *, reads: bool) -> None:
    """Copy every weight from the files to the sharded model. All ranks must call it together."""
    places: dict[str, torch.Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    missing = {name for name, _ in model.named_parameters()}
    for file in sorted(folder.glob("*.safetensors")):
        with _reading(folder), safe_open(file, framework="pt") as weights, torch.no_grad():
            for stored_name in weights.keys():
                name = _name_in_model(stored_name, model.base_model_prefix, places)
                # Skip second names of tied weights, and weights of other heads.
                if name is None:
                    continue
                _check_shape(folder, stored_name, weights.get_slice(stored_name), places[name])
                phase(f"loading {stored_name}")
                with gathered_from_reader(places[name]):
                    # Buffers are not sharded, so every rank reads them itself.
                    if reads or not isinstance(places[name], nn.Parameter):
                        places[name].copy_(weights.get_tensor(stored_name))
                missing.discard(name)
    check_none_missing(folder, missing)


def _name_in_model(
    stored_name: str, trunk_prefix: str, places: dict[str, torch.Tensor]
) -> str | None:
    """Return the name in the model of a stored weight; None if the model has no such weight.

    Some files add or omit the trunk's prefix.
    """
    prefix = f"{trunk_prefix}."
    for name in (stored_name, prefix + stored_name, stored_name.removeprefix(prefix)):
        if name in places:
            return name
    return None


def _check_shape(folder: Path, stored_name: str, stored: object, place: torch.Tensor) -> None:
    # pyrefly: ignore[missing-attribute]
    stored_shape = tuple(stored.get_shape())
    # A sharded parameter itself is empty. DeepSpeed keeps its full shape in `ds_shape`.
    expected_shape = tuple(getattr(place, "ds_shape", place.shape))
    if stored_shape != expected_shape:
        raise InputError(
            f"{folder}: {stored_name} has shape {stored_shape}, "
            f"but the configuration asks for {expected_shape}",
            "get the model again; its files do not belong together",
        )
