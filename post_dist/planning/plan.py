"""`post-dist plan`: what each stage of a run file takes on a cluster, from configurations alone, before a job is queued.

Every figure is a formula's (`cost.py`) with the hardware's (`hardware.yaml`): a model, not a measurement.
"""

from dataclasses import replace
from typing import Any

from post_dist.config.precision import Precision
from post_dist.config.schema import RunConfig
from post_dist.models.size import ModelSize
from post_dist.planning.hardware import Machine
from post_dist.planning.simulation import GPU_HOURS_BETWEEN_FAILURES, STORAGE_GB_PER_SECOND
from post_dist.planning.stages import distill, models_of, transfer, tune


def plan_run(
    config: RunConfig, teacher: ModelSize, machine: Machine, precision: Precision
) -> dict[str, Any]:
    """What the run takes.

    Returns:
        `stages`, each with memory of the fullest GPU, operations, bytes, seconds of a step and hours; `conflicts`, what cannot work;
        `hours` and `gpu_hours`, and what is `not_counted` in them; `assumptions`.
    """
    models = models_of(config, teacher)
    stages = [stage(config, models, machine, precision) for stage in (distill, tune, transfer)]
    conflicts = [
        f"{stage['stage']}: {problem}" for stage in stages for problem in stage["conflicts"]
    ]
    return {
        "gpus": machine.ranks,
        "precision": precision,
        "teacher_parameters": models.teacher.parameters,
        "student_parameters": models.student.parameters,
        "stages": stages,
        "hours": sum(stage["hours"] for stage in stages),
        "gpu_hours": sum(stage["gpu_hours"] for stage in stages),
        "not_counted": [
            "the evaluation",
            "what the models say of the public text before the transfer",
            *(name for name in config.evaluate.baselines if name == "full prompt tuning"),
        ],
        "conflicts": conflicts,
        "assumptions": {
            "teraflops_reached": machine.hardware.flops_per_second(precision) / 1e12,
            "gb_per_second_in_a_node": machine.hardware.bytes_per_second("node") / 1e9,
            "gb_per_second_between_nodes": machine.hardware.bytes_per_second("network") / 1e9,
            "gb_per_second_from_the_host": machine.hardware.host_bytes_per_second() / 1e9,
            "gpu_hours_between_failures": GPU_HOURS_BETWEEN_FAILURES,
            "checkpoint_gb_per_second": STORAGE_GB_PER_SECOND,
            "collectives_beside_computation": machine.hardware.overlap,
        },
    }


def nearest_that_fits(
    config: RunConfig, teacher: ModelSize, machine: Machine, precision: Precision
) -> dict[str, str] | None:
    """The first of a few changes, from the cheapest to the dearest, with which memory suffices; what to set, or None.

    None of them brings another conflict along.
    """
    checkpointing: dict[str, Any] = {"activation_checkpointing": True}
    in_groups: list[dict[str, Any]] = [{"shard_group": group} for group in ("node", "all")]
    layouts = [checkpointing]
    for changes in (*in_groups, *(changes | {"offload": "cpu"} for changes in in_groups)):
        layouts += [changes, changes | checkpointing]
    smaller = (rows for rows in (4, 2, 1) if rows < config.distill.micro_batch_size_per_gpu)
    candidates = [("distill", {"micro_batch_size_per_gpu": rows}, machine) for rows in smaller]
    candidates += [("engine", changes, machine) for changes in layouts]
    more_nodes = (
        replace(machine, nodes=nodes) for nodes in (2, 4, 8, 16, 32, 64) if nodes > machine.nodes
    )
    candidates += [
        ("engine", {"shard_group": "all"} | checkpointing, place) for place in more_nodes
    ]
    known = set(plan_run(config, teacher, machine, precision)["conflicts"])
    for name, changes, place in candidates:
        section = getattr(config, name).model_copy(update=changes)
        found = plan_run(config.model_copy(update={name: section}), teacher, place, precision)
        if all(stage["fits"] for stage in found["stages"]) and known.issuperset(found["conflicts"]):
            settings = {f"{name}.{key}": str(value).lower() for key, value in changes.items()}
            return settings | ({"--nodes": str(place.nodes)} if place != machine else {})
    return None
