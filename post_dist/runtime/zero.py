"""DeepSpeed engines: ZeRO-3 for a frozen large model, any ZeRO stage for the student."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from post_dist.config.schema import Engine
from post_dist.conflicts import Layout, raise_conflicts
from post_dist.runtime.distributed import World
from post_dist.runtime.shard_group import engine_conflicts, shard_group_size

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class ShardGroup:
    """The ranks that share one copy of a frozen model.

    Attributes:
        size: number of ranks; 1 if each rank has its own copy.
        reads: whether this rank reads the weights for its group.
        process_group: torch's process group; None if there is one rank, or the group has all ranks.
    """

    size: int
    reads: bool
    process_group: Any


def layout_of(engine: Engine, world: World) -> Layout:
    """Describe the ranks of this run. All ranks call it together.

    Raises:
        InputError: `engine.shard_group: node` on nodes of different sizes.
    """
    # Only one group per node needs nodes of equal size.
    ranks_per_node = world.ranks_of_a_node() if engine.shard_group == "node" else world.size
    return Layout(world.size, ranks_per_node, world.device.type)


@lru_cache
def shard_group(engine: Engine, world: World) -> ShardGroup:
    """Return this rank's group, by `engine.shard_group`. All ranks call it together.

    The result is cached, because each call would make new process groups in torch.

    Raises:
        InputError: the engine settings do not suit the ranks (see `engine_conflicts`).
    """
    layout = layout_of(engine, world)
    raise_conflicts("engine", engine_conflicts(engine, layout))
    size = shard_group_size(engine, layout)
    reads = world.rank % size == 0
    if size in (1, world.size):
        return ShardGroup(size, reads, None)
    # torch needs every rank to create every group, even groups that it does not belong to.
    groups = []
    for first in range(0, world.size, size):
        groups.append(dist.new_group(list(range(first, first + size))))
    return ShardGroup(size, reads, groups[world.rank // size])


def freeze_sharded(model: Model, settings: dict[str, Any]) -> Model:
    """Freeze a model that was created in ZeRO-3 shards, and return it ready to run.

    The result is the module itself instead of a DeepSpeed engine. `loss.backward()` then reaches
    its input tensors, such as a soft prompt. The caller averages their gradients over ranks. Every
    rank must call the module equally often.

    Args:
        model: a model that was created under `deepspeed.zero.Init`.
        settings: the DeepSpeed settings of a frozen model.
    """
    # The hooks on the module keep the engine alive.
    engine, *_ = deepspeed.initialize(model=model.requires_grad_(False), config=settings)
    return engine.module


def train_sharded(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> deepspeed.DeepSpeedEngine:
    """Return the engine that trains a model. Frozen parameters of the model are not updated.

    Args:
        model: a whole model.
        optimizer: an optimizer over the model's trained parameters.
        settings: the DeepSpeed settings for training.
    """
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def gathered(module: nn.Module) -> AbstractContextManager[None]:
    """Gather the parameters of a module on every rank while the body reads them.

    All ranks enter it together.
    """
    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        list(module.parameters())
    )
    return context


def gathered_from_reader(weight: torch.Tensor) -> AbstractContextManager[None]:
    """Gather a sharded weight, and give all ranks the value of the first rank afterwards.

    The body may change the weight on the group's first rank. A weight that is not sharded is left
    unchanged.
    """
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        [weight], modifier_rank=0
    )
    return context


def full_weights(model: nn.Module, world: World) -> dict[str, torch.Tensor]:
    """Return the whole state of a model on rank 0, in host memory.

    A sharded model is gathered. All ranks call it together, and the other ranks get an empty
    dictionary.
    """
    weights: dict[str, torch.Tensor] = {}
    with gathered(model):
        if world.is_main:
            # A copy, because the gathered weights are freed when this context ends.
            for name, tensor in model.state_dict().items():
                weights[name] = tensor.detach().to("cpu", copy=True)
    return weights


def shard_share(model: nn.Module) -> float:
    """Return the fraction of a model's parameters that this rank holds; 1 without sharding."""
    held = 0
    whole = 0
    for parameter in model.parameters():
        # A sharded parameter is empty itself. DeepSpeed stores its shard and size as attributes.
        held += getattr(parameter, "ds_tensor", parameter).numel()
        whole += getattr(parameter, "ds_numel", parameter.numel())
    return held / whole
