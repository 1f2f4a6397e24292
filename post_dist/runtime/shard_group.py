"""The ranks of a run as a layout, and this rank's part of it: the group that shares a model."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch.distributed as dist

from post_dist.config.schema import Engine
from post_dist.conflicts import Layout, raise_conflicts
from post_dist.runtime.distributed import World
from post_dist.runtime.engine_conflicts import engine_conflicts, shard_group_size


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


def shard_group(engine: Engine, world: World) -> ShardGroup:
    """Return this rank's group, by `engine.shard_group`. All ranks call it together.

    Raises:
        InputError: the engine settings do not suit the ranks (see `engine_conflicts`).
    """
    layout = layout_of(engine, world)
    raise_conflicts("engine", engine_conflicts(engine, layout))
    return _group_of_size(shard_group_size(engine, layout), world)


@lru_cache
def _group_of_size(size: int, world: World) -> ShardGroup:
    """Return this rank's group of neighbors. The cache saves torch from making groups anew."""
    reads = world.rank % size == 0
    if size in (1, world.size):
        return ShardGroup(size, reads, None)
    # torch needs every rank to create every group, even groups that it does not belong to.
    groups = []
    for first in range(0, world.size, size):
        groups.append(dist.new_group(list(range(first, first + size))))
    return ShardGroup(size, reads, groups[world.rank // size])
