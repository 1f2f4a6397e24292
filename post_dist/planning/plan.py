"""`post-dist plan`: what each stage of a run file takes on a cluster, from configurations alone, before a job is queued.

Every figure is a formula's (`cost.py`) with the hardware's (`hardware.yaml`): a model, not a measurement.
"""

from dataclasses import replace
from typing import Any

from post_dist.config.deepspeed import Precision
from post_dist.config.schema import RunConfig
from post_dist.planning.hardware import Machine
from post_dist.planning.simulate import GPU_HOURS_BETWEEN_FAILURES, STORAGE_GB_PER_SECOND
from post_dist.planning.sizes import ModelSize
from post_dist.planning.stages import distill, models_of, transfer, tune


def plan_run(config: RunConfig, teacher: ModelSize, machine: Machine, precision: Precision) -> dict[str, Any]:
    """What the run takes.

    Returns:
        `stages`, each with memory of the fullest GPU, operations, bytes, seconds of a step and hours; `conflicts`, what cannot work;
        `hours` and `gpu_hours`; `assumptions`.
    """
    models = models_of(config, teacher)
    stages = [stage(config, models, machine, precision) for stage in (distill, tune, transfer)]
    conflicts = [f"{stage['stage']}: {problem}" for stage in stages for problem in stage["conflicts"]]
    return {
        "gpus": machine.ranks,
        "precision": precision,
        "teacher_parameters": models.teacher.parameters,
        "student_parameters": models.student.parameters,
        "stages": stages,
        "hours": sum(stage["hours"] for stage in stages),
        "gpu_hours": sum(stage["gpu_hours"] for stage in stages),
        "conflicts": conflicts,
        "assumptions": {
            "teraflops_reached": machine.hardware.flops_per_second(precision) / 1e12,
            "gb_per_second_in_a_node": machine.hardware.bytes_per_second("node") / 1e9,
            "gb_per_second_between_nodes": machine.hardware.bytes_per_second("network") / 1e9,
            "gpu_hours_between_failures": GPU_HOURS_BETWEEN_FAILURES,
            "checkpoint_gb_per_second": STORAGE_GB_PER_SECOND,
            "collectives_beside_computation": machine.hardware.overlap,
        },
    }


def nearest_that_fits(config: RunConfig, teacher: ModelSize, machine: Machine, precision: Precision) -> dict[str, str] | None:
    """The first of a few changes, from the cheapest to the dearest, with which memory suffices; what to set, or None."""

    def with_engine(**fields: Any) -> RunConfig:
        return config.model_copy(update={"engine": config.engine.model_copy(update=fields)})

    candidates: list[tuple[dict[str, str], RunConfig, Machine]] = []
    for micro in (4, 2, 1):
        if micro < config.distill.micro_batch_size_per_gpu:
            smaller = config.model_copy(update={"distill": config.distill.model_copy(update={"micro_batch_size_per_gpu": micro})})
            candidates.append(({"distill.micro_batch_size_per_gpu": str(micro)}, smaller, machine))
    checkpointing = {"engine.activation_checkpointing": "true"}
    candidates.append((checkpointing, with_engine(activation_checkpointing=True), machine))
    for group in ("node", "all"):
        shared = {"engine.shard_group": group}
        candidates.append((shared, with_engine(shard_group=group), machine))
        candidates.append((shared | checkpointing, with_engine(shard_group=group, activation_checkpointing=True), machine))
    for nodes in (2, 4, 8, 16, 32, 64):
        if nodes > machine.nodes:
            changes = {"engine.shard_group": "all", **checkpointing, "--nodes": str(nodes)}
            larger = replace(machine, nodes=nodes)
            candidates.append((changes, with_engine(shard_group="all", activation_checkpointing=True), larger))
    for changes, changed, place in candidates:
        stages = plan_run(changed, teacher, place, precision)["stages"]
        if all(stage["memory_total_gib"] <= place.hardware.memory_gib for stage in stages):
            return changes
    return None
