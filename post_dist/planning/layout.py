"""The layout of a frozen model over the ranks, and its cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from post_dist.conflicts import Conflict
from post_dist.models.size import ModelSize
from post_dist.planning import cost
from post_dist.planning.hardware import Machine
from post_dist.planning.inputs import PlanInputs
from post_dist.planning.memory import GIB

_REPLICATE_BELOW = 0.4
"""A frozen model or a shard of it fits if it takes at most this fraction of a GPU's memory."""


@dataclass(frozen=True)
class GroupAdvice:
    """The smallest shard group that fits.

    Attributes:
        group: a value for `engine.shard_group`.
        reason: why it fits, with sizes.
    """

    group: str
    reason: str


def advised_group(size: ModelSize, machine: Machine, bytes_each: int) -> GroupAdvice:
    """Find the smallest shard group that fits.

    In a smaller group, each rank receives fewer bytes. The links inside a node are the fastest.

    Args:
        size: the frozen model.
        machine: the GPUs.
        bytes_each: bytes of one weight.
    """
    # A whole copy on each GPU comes first, then a copy in each node.
    capacity = machine.hardware.memory_gib
    whole = size.parameters * bytes_each / GIB
    if whole <= _REPLICATE_BELOW * capacity:
        return GroupAdvice(
            "1", f"{whole:.0f} GiB fit on each GPU of {capacity:g} GiB: nothing is gathered"
        )
    part = whole / machine.gpus_per_node
    if part <= _REPLICATE_BELOW * capacity:
        return GroupAdvice(
            "node",
            f"{part:.1f} of {whole:.0f} GiB fit on each GPU of a node: "
            "no weight crosses the network",
        )
    return GroupAdvice("all", f"{whole:.0f} GiB do not fit on one node beside the rest")


def group_numbers(inputs: PlanInputs) -> dict[str, Any]:
    """Return the shard group of the large model and the advised one, for the plan's JSON."""
    advice = advised_group(inputs.models.teacher, inputs.machine, inputs.bytes_each)
    return {"size": inputs.group, "advised": advice.group, "why": advice.reason}


def fetched_bytes(inputs: PlanInputs, models: Sequence[ModelSize]) -> float:
    """Compute the bytes of offloaded shards that a rank copies to its GPU, one pass for each model.

    ZeRO-3 copies a shard right before it gathers the weight, in the same stream.
    """
    if inputs.config.engine.offload == "none":
        return 0.0
    return sum(cost.shard_bytes(size, inputs.group, inputs.bytes_each) for size in models)


def offloaded_bytes(inputs: PlanInputs) -> float:
    """Compute the bytes of a rank's shard of the large model that stay in host memory."""
    # With `offload: nvme`, shards are on disk.
    if inputs.config.engine.offload != "cpu":
        return 0.0
    return cost.shard_bytes(inputs.models.teacher, inputs.group, inputs.bytes_each)


def idle_conflicts(stage: str, batch_size: int, ranks: int) -> list[Conflict]:
    """Find GPUs that get no example of a batch. The stage runs, but these GPUs are wasted."""
    if batch_size >= ranks:
        return []
    message = f"{stage}.batch_size {batch_size} leaves {ranks - batch_size} of {ranks} GPUs idle"
    return [Conflict(message, f"raise {stage}.batch_size, or use fewer GPUs")]


def nonzero(**parts: float) -> dict[str, float]:
    """Return the parts that are not 0. Only some runs have these parts."""
    return {name: value for name, value in parts.items() if value}
