"""How many ranks share one copy of a frozen model: the rule behind `engine.shard_group`."""

from post_dist.config.schema import Engine
from post_dist.conflicts import Conflict, Layout


def shard_group_size(engine: Engine, layout: Layout) -> int:
    """Number of ranks that share one copy of a frozen model."""
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
    elif size == 1 < layout.ranks and engine.offload != "none":
        found.append(
            Conflict(
                "engine.shard_group is one rank here, which keeps frozen models whole: "
                "there is nothing to offload",
                "set engine.shard_group: all, or engine.offload: none",
            )
        )
    if layout.device == "cpu":
        found += _cpu_conflicts(engine)
    return found


def precision_conflicts(engine: Engine, device: str) -> list[Conflict]:
    """Find out whether a device, `cuda` or `cpu`, runs the precision of the run file."""
    if device == "cpu" and engine.precision == "fp16":
        return [
            Conflict(
                "engine.precision: fp16 does not run on a CPU",
                "set engine.precision to auto, bf16 or fp32",
            )
        ]
    return []


def _cpu_conflicts(engine: Engine) -> list[Conflict]:
    """Find the settings that need a GPU."""
    found = precision_conflicts(engine, "cpu")
    if engine.quantized_gathers:
        found.append(
            Conflict(
                "engine.quantized_gathers: DeepSpeed's int8 kernels do not run on a CPU",
                "leave it out",
            )
        )
    return found
