"""A frozen large model, read straight into ZeRO-3 shards: no process ever holds more of it than its share and one weight.

transformers' own loader under ZeRO-3 peaks above a whole model on rank 0. Here the model is made in shards, and each weight is
read by one rank of a shard group from the safetensors files, broadcast, and cut up again before the next one.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import prevent_arange_dtype_change

from post_dist.config.deepspeed import frozen_settings
from post_dist.config.precision import Precision
from post_dist.config.schema import Engine
from post_dist.errors import EnvironmentFault, InputError
from post_dist.models.language_model import LanguageModel, check_no_scale
from post_dist.models.load import load_config, load_whole, model_settings
from post_dist.runtime.allocator import memory_given_back_at_once
from post_dist.runtime.distributed import World
from post_dist.runtime.watchdog import phase
from post_dist.runtime.zero import freeze_sharded, gathered_from_reader, shard_group

log = logging.getLogger(__name__)


def load_sharded(folder: Path, engine: Engine, precision: Precision, world: World) -> LanguageModel:
    """Load a model in ZeRO-3 shards, to be run and never trained. All ranks call it, and run it equally often.

    Args:
        folder: in Hugging Face format; every rank sees it.
        engine: the shard group, offload and checkpointing of activations.
        precision: of the weights.
        world: the ranks.

    Raises:
        InputError: weights are missing, do not fit, or cannot be read; head and trunk are more than the model; or this device cannot do
            what `engine` asks for.
        EnvironmentFault: `offload: nvme` without libaio.
    """
    group = shard_group(engine, world)
    if engine.offload == "nvme" and not AsyncIOBuilder().is_compatible(verbose=False):
        raise EnvironmentFault(
            "engine.offload: nvme needs libaio, which is not here",
            "install libaio-dev, or take offload: cpu",
        )
    if group.size == 1 and (world.size > 1 or engine.offload == "none"):
        model = load_whole(folder, precision, world.device)
    else:
        check_no_scale(load_config(folder))
        settings = frozen_settings(engine, precision, -(-_largest_weight(folder) // group.size))
        family, masked, made_with = model_settings(folder, precision, world.device)
        # `from_config` would open zero.Init itself if it were told of ZeRO-3, but for all ranks and never for a group of them.
        # It takes the dtype from the settings alone: DeepSpeed 0.19.8 makes any `dtype` bf16 on a CPU.
        made_in_shards = deepspeed.zero.Init(
            data_parallel_group=group.process_group, config_dict_or_path=settings
        )
        # The heap would keep the holes between shards: measured with 2 ranks, a peak of 2.6 shards in place of 1.5.
        with memory_given_back_at_once():
            with no_init_weights(), prevent_arange_dtype_change(), made_in_shards:
                bare = family.from_config(load_config(folder), **made_with)
            bare.tie_weights()
            _fill(bare, folder, reads=group.reads)
        model = freeze_sharded(LanguageModel(bare, masked=masked).eval(), settings)
    if engine.activation_checkpointing:
        model.checkpoint_activations()
    return model


def _largest_weight(folder: Path) -> int:
    """Elements of the largest weight in the files."""
    sizes = []
    for file in folder.glob("*.safetensors"):
        with _reading(folder), safe_open(file, framework="pt") as weights:
            sizes += [math.prod(weights.get_slice(name).get_shape()) for name in weights.keys()]
    return max(sizes)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder} cannot be loaded: {error}") from None


def _fill(model: nn.Module, folder: Path, *, reads: bool) -> None:
    """Put every weight of the files into the sharded model."""
    places: dict[str, torch.Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    missing = {name for name, _ in model.named_parameters()}
    prefix = f"{model.base_model_prefix}."
    for file in sorted(folder.glob("*.safetensors")):
        with _reading(folder), safe_open(file, framework="pt") as weights, torch.no_grad():
            for stored in weights.keys():
                name = next(
                    (
                        name
                        for name in (stored, prefix + stored, stored.removeprefix(prefix))
                        if name in places
                    ),
                    None,
                )
                if name is None:  # a second name of a tied weight, or something of another head
                    continue
                place, shape = places[name], tuple(weights.get_slice(stored).get_shape())
                if shape != tuple(getattr(place, "ds_shape", place.shape)):
                    raise InputError(
                        f"{folder}: {stored} has shape {shape}, which does not fit the configuration"
                    )
                phase(f"loading {stored}")
                with gathered_from_reader(place):
                    if reads or not isinstance(place, nn.Parameter):
                        place.copy_(weights.get_tensor(stored))
                missing.discard(name)
    if missing:
        raise InputError(
            f"{folder} lacks weights, such as {min(missing)}", "they would be left random"
        )
