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
        size: how many they are; 1 when each rank has its own copy.
        reads: whether this rank reads the weights for the others.
        process_group: None for all ranks.
    """

    size: int
    reads: bool
    process_group: Any


def layout_of(engine: Engine, world: World) -> Layout:
    """Describe the ranks of this run. All ranks call it together.

    Raises:
        InputError: `engine.shard_group: node` on nodes of different sizes.
    """
    # Only a group per node asks for nodes of equal size.
    of_a_node = world.ranks_of_a_node() if engine.shard_group == "node" else world.size
    return Layout(world.size, of_a_node, world.device.type)


@lru_cache
def shard_group(engine: Engine, world: World) -> ShardGroup:
    """This rank's group, by `engine.shard_group`. All ranks call it.

    Raises:
        InputError: the ranks do not part into such groups, or a rank by itself would have to offload what it keeps whole.
    """
    layout = layout_of(engine, world)
    raise_conflicts("engine", engine_conflicts(engine, layout))
    size = shard_group_size(engine, layout)
    if size == world.size:
        return ShardGroup(size, world.is_main, None)
    groups = (
        [dist.new_group(list(range(first, first + size))) for first in range(0, world.size, size)]
        if size > 1
        else []
    )
    return ShardGroup(size, world.rank % size == 0, groups[world.rank // size] if groups else None)


def freeze_sharded(model: Model, settings: dict[str, Any]) -> Model:
    """A model that was made in ZeRO-3 shards, to be run and never trained.

    Call the module that is returned, not a DeepSpeed engine: then `loss.backward()` reaches tensors that went in, such as
    a soft prompt, and the caller reduces their gradients. Every rank must call it equally often.
    """
    engine, *_ = deepspeed.initialize(model=model.requires_grad_(False), config=settings)
    return engine.module


def train_sharded(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> deepspeed.DeepSpeedEngine:
    """The engine that trains `model`; its frozen parameters take part in the forward alone."""
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def gathered(module: nn.Module) -> AbstractContextManager[None]:
    """While entered, the module's parameters are whole on this rank, for reading. All ranks enter it."""
    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        list(module.parameters())
    )
    return context


def gathered_from_reader(weight: torch.Tensor) -> AbstractContextManager[None]:
    """While entered, a sharded weight is whole, and what the group's first rank makes of it is shared out when it is left."""
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        [weight], modifier_rank=0
    )
    return context


def full_weights(model: nn.Module, world: World) -> dict[str, torch.Tensor]:
    """The whole state of a model, gathered from its shards if it has any: on rank 0, in host memory. All ranks call it."""
    with gathered(model):
        return (
            {
                name: tensor.detach().to("cpu", copy=True)
                for name, tensor in model.state_dict().items()
            }
            if world.is_main
            else {}
        )


def shard_share(model: nn.Module) -> float:
    """The share of a model's parameters that this rank holds: 1 when it is not sharded."""
    held = whole = 0
    for parameter in model.parameters():
        whole += getattr(parameter, "ds_numel", parameter.numel())
        held += (
            parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel()
        )
    return held / whole
