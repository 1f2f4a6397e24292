"""Load a frozen large model straight into ZeRO-3 shards.

No process ever holds more than its own shard and one whole weight. Under ZeRO-3, the loader of
transformers needs more than a whole model on rank 0. Here the model is created in shards. Then one
rank of a shard group reads each weight from the safetensors files, and converts it as transformers
does. The weight is broadcast, and sharded before the next one is read.
"""

import logging
import math
from collections.abc import Iterable
from pathlib import Path

import deepspeed
import torch

# pyrefly: ignore[missing-module-attribute]
from deepspeed.ops.op_builder import AsyncIOBuilder
from torch import nn
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import prevent_arange_dtype_change

from post_dist.config.deepspeed import frozen_settings
from post_dist.config.precision import Precision
from post_dist.config.schema import Engine
from post_dist.errors import EnvironmentFault
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_whole, model_settings
from post_dist.models.weight_files import check_tied
from post_dist.models.weight_units import Piece, WeightReader, weight_units
from post_dist.runtime.allocator import memory_given_back_at_once
from post_dist.runtime.deepspeed_conflicts import naming_deepspeed_settings
from post_dist.runtime.distributed import World, prepare_deepspeed
from post_dist.runtime.gathering import gathered_from_reader
from post_dist.runtime.shard_group import ShardGroup, shard_group
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
            trunk with one head. Or this device or DeepSpeed does not support the settings of
            `engine`.
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
        model = _load_shards(folder, engine, precision, group, world)
    if engine.activation_checkpointing:
        model.checkpoint_activations()
    return model


def _load_shards(
    folder: Path, engine: Engine, precision: Precision, group: ShardGroup, world: World
) -> LanguageModel:
    settings = model_settings(folder, precision, world.device)
    with torch.device("meta"):
        on_meta = settings.auto_class.from_config(settings.config, **settings.arguments)
    # Whatever is wrong with the files is found here, on all ranks alike, before they share a step.
    units = weight_units(on_meta, folder)
    # One rank reads them, because two tables of a large model have gigabytes.
    world.on_main(lambda: check_tied(folder, on_meta.all_tied_weights_keys))
    largest = max(parameter.numel() for parameter in on_meta.parameters())
    zero_settings = frozen_settings(engine, precision, math.ceil(largest / group.size))

    # `from_config` can open zero.Init itself, but only for all ranks and not for a group. The dtype
    # comes only from DeepSpeed's settings, because DeepSpeed 0.19.8 turns any argument `dtype` into
    # bf16 on a CPU.
    with naming_deepspeed_settings(engine):
        created_in_shards = deepspeed.zero.Init(
            data_parallel_group=group.process_group, config_dict_or_path=zero_settings
        )
    # Otherwise the heap would keep freed memory between shards. With 2 ranks, the measured peak
    # was then 2.6 shards instead of 1.5.
    with memory_given_back_at_once():
        with no_init_weights(), prevent_arange_dtype_change(), created_in_shards:
            model = settings.auto_class.from_config(settings.config, **settings.arguments)
        model.tie_weights()
        places = model.state_dict(keep_vars=True)
        with WeightReader(folder) as reader:
            for unit in units:
                phase(f"loading {unit.name}")
                weights = {name: places[name] for name in unit.targets}
                _fill(weights, unit.pieces(on_meta, reader), reads=group.reads)
    language_model = LanguageModel(model, masked=settings.masked).eval()
    with naming_deepspeed_settings(engine):
        return freeze_sharded(language_model, zero_settings)


@torch.no_grad()
def _fill(weights: dict[str, torch.Tensor], pieces: Iterable[Piece], *, reads: bool) -> None:
    """Copy the weights of a unit to the sharded model. All ranks must call it together.

    Args:
        weights: the weights of the model that the unit becomes, by their names.
        pieces: their values. A rank that does not need them does not read them.
        reads: whether this is the rank of its shard group that reads the files.
    """
    # A conversion that makes several weights makes them together, so they are gathered together.
    sharded = [weight for weight in weights.values() if isinstance(weight, nn.Parameter)]
    # Buffers are not sharded, so every rank reads them itself.
    reads = reads or len(sharded) < len(weights)
    with gathered_from_reader(sharded):
        if not reads:
            return
        for piece in pieces:
            end = piece.first + piece.values.numel()
            weights[piece.target].view(-1)[piece.first : end].copy_(piece.values.reshape(-1))
