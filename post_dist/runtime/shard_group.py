"""Rules of the run file's `engine` section that depend on the ranks and their device."""

from post_dist.config.schema import Engine
from post_dist.conflicts import Conflict, Layout


def shard_group_size(engine: Engine, layout: Layout) -> int:
    """Return the number of ranks that share one copy of a frozen model."""
    if engine.shard_group == "all":
        return layout.ranks
    if engine.shard_group == "node":
        return layout.ranks_per_node
    return engine.shard_group


def engine_conflicts(engine: Engine, layout: Layout) -> list[Conflict]:
    """Find the engine settings that do not suit the layout of the ranks or their device."""
    found = []
    size = shard_group_size(engine, layout)
    if layout.ranks % size:
        found.append(
            Conflict(
                f"engine.shard_group: {layout.ranks} ranks do not divide into groups of {size}",
                "choose a divisor of the number of ranks, or engine.shard_group: all",
            )
        )
    # A single process may offload all it has: it is a group of one by `shard_group: all`.
    elif size == 1 < layout.ranks and engine.offload != "none":
        found.append(
            Conflict(
                "engine.shard_group is one rank here, which keeps frozen models whole: "
                "there is nothing to offload",
                "set engine.shard_group: all, or engine.offload: none",
            )
        )
    found += precision_conflicts(engine, layout.device)
    if layout.device == "cpu" and engine.quantized_gathers:
        found.append(
            Conflict(
                "engine.quantized_gathers: DeepSpeed's int8 kernels do not run on a CPU",
                "leave it out",
            )
        )
    return found


def precision_conflicts(engine: Engine, device: str) -> list[Conflict]:
    """Find a precision that the device does not run.

    Args:
        engine: the settings.
        device: torch's name for the kind of device, such as `cpu`.
    """
    if engine.precision != "fp16" or device != "cpu":
        return []
    return [
        Conflict(
            "engine.precision: fp16 does not run on a CPU",
            "set engine.precision to auto, bf16 or fp32",
        )
    ]
