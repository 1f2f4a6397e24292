"""Check engine settings against the layout of the ranks: shard groups, offload and devices."""

from post_dist.config.schema import Engine
from post_dist.conflicts import Conflict, Layout
from post_dist.runtime.deepspeed_conflicts import deepspeed_conflicts
from post_dist.runtime.precision import precision_conflicts


def shard_group_size(engine: Engine, layout: Layout) -> int:
    """Return the number of ranks that share one copy of a frozen model."""
    if engine.shard_group == "all":
        return layout.ranks
    if engine.shard_group == "node":
        return layout.ranks_per_node
    return engine.shard_group


def engine_conflicts(engine: Engine, layout: Layout) -> list[Conflict]:
    """Find the engine settings that do not suit a stage whose models are sharded.

    Args:
        engine: settings of the run file.
        layout: the ranks of the stage and their device.
    """
    found = _group_conflicts(engine, layout)
    found += precision_conflicts(engine, layout.device)
    found += deepspeed_conflicts(engine)
    if engine.quantized_gathers and layout.device == "cpu":
        found.append(
            Conflict(
                "engine.quantized_gathers: DeepSpeed's int8 kernels do not run on a CPU",
                "leave it out",
            )
        )
    return found


def compile_conflicts(engine: Engine, layout: Layout) -> list[Conflict]:
    """Check that a frozen large model is whole on each rank if its layers are compiled."""
    is_sharded = shard_group_size(engine, layout) > 1 or engine.offload != "none"
    if not (engine.compile and is_sharded):
        return []
    return [
        Conflict(
            "engine.compile: the large LLM is sharded here",
            "set engine.shard_group: 1 and engine.offload: none, or leave engine.compile out",
        )
    ]


def _group_conflicts(engine: Engine, layout: Layout) -> list[Conflict]:
    """Check that the ranks divide into shard groups, and that offload has shards to move."""
    # The schema refuses `shard_group: 1` with offload, but `node` and `all` may also mean 1 rank.
    size = shard_group_size(engine, layout)
    if layout.ranks % size:
        return [
            Conflict(
                f"engine.shard_group: {layout.ranks} ranks do not divide into groups of {size}",
                "choose a divisor of the number of ranks, or engine.shard_group: all",
            )
        ]
    if size == 1 < layout.ranks and engine.offload != "none":
        return [
            Conflict(
                "engine.shard_group is one rank here, which keeps frozen models whole: "
                "there is nothing to offload",
                "set engine.shard_group: all, or engine.offload: none",
            )
        ]
    return []
