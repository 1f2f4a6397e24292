"""`post-dist plan`: what each stage of a run file needs on a cluster, before a job is queued.

Every number comes from a formula (`cost.py`) and the hardware (`hardware.yaml`). It is a model, not
a measurement. A plan needs only configurations: no weights and no GPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from post_dist.config.cluster import ClusterStage
from post_dist.config.precision import Precision
from post_dist.config.schema import RunConfig
from post_dist.models.size import ModelSize
from post_dist.planning.corpus import plan_corpus
from post_dist.planning.distill import plan_distill
from post_dist.planning.estimate import StageEstimate, stage_numbers
from post_dist.planning.hardware import Machine
from post_dist.planning.inputs import PlanInputs, models_of
from post_dist.planning.memory import frozen_memory
from post_dist.planning.signals import plan_signals
from post_dist.planning.simulation import GPU_HOURS_BETWEEN_FAILURES, STORAGE_GB_PER_SECOND
from post_dist.planning.transfer import plan_transfer
from post_dist.planning.tune import plan_tune
from post_dist.planning.warm_start import plan_warm_start

_MORE_NODES = (2, 4, 8, 16, 32, 64)
_SMALLER_MICRO_BATCHES = (4, 2, 1)


def plan_run(
    config: RunConfig, teacher: ModelSize, machine: Machine, precision: Precision
) -> dict[str, Any]:
    """Plan the stages of a run.

    Args:
        config: the run file.
        teacher: size of the large model.
        machine: the nodes and GPUs of `distill`, and the nodes of stages that have others.
        precision: precision of weights and activations.

    Returns:
        `corpus`: what tokenizing takes. `stages`, each with the memory of the fullest GPU,
        operations, bytes, seconds of a step and hours; `signals` comes first if the run file has
        workers. `conflicts` of all stages. `hours` and `gpu_hours` in total, and what is
        `not_counted` in them. `assumptions`: the rates that the plan uses.
    """
    inputs = PlanInputs(config, models_of(config, teacher), machine, precision)
    stages = [stage_numbers(estimate, machine) for estimate in _estimates(inputs)]
    # Each conflict starts with its stage, because a plan prints all conflicts in one list.
    conflicts = []
    for stage in stages:
        for conflict in stage["conflicts"]:
            conflicts.append(f"{stage['stage']}: {conflict}")
    conflicts += _evaluation_conflicts(_for_stage(inputs, "evaluate"))
    return {
        "gpus": machine.ranks,
        "gpu_memory_gib": machine.hardware.memory_gib,
        "precision": precision,
        "teacher_parameters": inputs.models.teacher.parameters,
        "student_parameters": inputs.models.student.parameters,
        "corpus": plan_corpus(config),
        "stages": stages,
        "hours": _hours(stages),
        "gpu_hours": sum(stage["gpu_hours"] for stage in stages),
        "not_counted": _not_counted(config),
        "conflicts": conflicts,
        "assumptions": _assumptions(inputs),
    }


def _estimates(inputs: PlanInputs) -> Iterator[StageEstimate]:
    """Yield the estimates of the run's stages, in the order in which they start."""
    distillation = plan_distill(inputs)
    config = inputs.config
    # Planning distillation has checked that both sections are there.
    if config.cluster.signals.workers and config.corpus and config.student:
        yield plan_signals(inputs, config.corpus, config.student)
    yield distillation
    if inputs.config.warm_start is not None:
        yield plan_warm_start(_for_stage(inputs, "warm_start"), inputs.config.warm_start)
    yield plan_tune(inputs)
    yield plan_transfer(_for_stage(inputs, "transfer"))


def _for_stage(inputs: PlanInputs, stage: ClusterStage) -> PlanInputs:
    return replace(inputs, machine=inputs.machine.of_stage(stage))


def _evaluation_conflicts(inputs: PlanInputs) -> list[str]:
    """Say if the large model alone does not fit on the GPUs of the evaluation."""
    held = frozen_memory(
        inputs.models.teacher, inputs.config.engine, inputs.group, inputs.bytes_each
    )
    of_gpu = inputs.machine.hardware.memory_gib
    if sum(held.values()) <= of_gpu:
        return []
    return [
        f"evaluate: {sum(held.values()):.1f} GiB of the large model on a GPU of {of_gpu:g} GiB "
        "(raise cluster.evaluate.nodes)"
    ]


def _hours(stages: Sequence[dict[str, Any]]) -> float:
    """Add up the hours of the stages. Workers write signals while `distill` trains on them."""
    hours = {stage["stage"]: stage["hours"] for stage in stages}
    hours["distill"] = max(hours["distill"], hours.pop("signals", 0.0))
    return float(sum(hours.values()))


def _not_counted(config: RunConfig) -> list[str]:
    """List what the hours leave out."""
    before = []
    if config.warm_start is not None:
        before.append("the warm start")
    # A head is fitted with these passes alone, so they are the transfer, if their number is known.
    limited = config.public_task is not None and config.public_task.max_rows is not None
    if config.transfer.adapter != "head" or not limited:
        before.append("the transfer")
    found = ["the evaluation"]
    if before:
        found.append(f"the models' passes over the public text before {' and '.join(before)}")
    if config.tune.adapter == "head" and not config.privacy.enabled:
        found.append("the pass over the private examples before a head without privacy")
    if "full prompt tuning" in config.evaluate.baselines:
        found.append("full prompt tuning")
    return found


def _assumptions(inputs: PlanInputs) -> dict[str, float]:
    """Return the rates that the plan assumes."""
    hardware = inputs.machine.hardware
    return {
        "teraflops_reached": inputs.flops_per_second / 1e12,
        "gb_per_second_in_a_node": hardware.bytes_per_second("node") / 1e9,
        "gb_per_second_between_nodes": hardware.bytes_per_second("network") / 1e9,
        "gb_per_second_from_the_host": hardware.host_bytes_per_second() / 1e9,
        "gpu_hours_between_failures": GPU_HOURS_BETWEEN_FAILURES,
        "checkpoint_gb_per_second": STORAGE_GB_PER_SECOND,
        "collectives_beside_computation": inputs.overlap,
    }


@dataclass(frozen=True)
class _Change:
    """A change that lowers memory.

    Attributes:
        section: section of the run file.
        fields: fields of the section and their new values.
        machine: the nodes to run on.
    """

    section: Literal["distill", "engine"]
    fields: dict[str, Any]
    machine: Machine

    def apply(self, config: RunConfig) -> RunConfig:
        """Return the run file with the change."""
        section = getattr(config, self.section).model_copy(update=self.fields)
        return config.model_copy(update={self.section: section})

    def settings(self, machine: Machine) -> dict[str, str]:
        """Return the change as options of the command line, for a plan on `machine`."""
        found = {}
        for key, value in self.fields.items():
            found[f"{self.section}.{key}"] = str(value).lower()
        if self.machine != machine:
            found["--nodes"] = str(self.machine.nodes)
        return found


def nearest_that_fits(
    config: RunConfig, teacher: ModelSize, machine: Machine, precision: Precision
) -> dict[str, str] | None:
    """Find the cheapest of a few changes with which the run fits into memory.

    A change that causes another conflict is skipped.

    Args:
        config: the run file.
        teacher: size of the large model.
        machine: the nodes and GPUs.
        precision: precision of weights and activations.

    Returns:
        The options to set, or None if no change is enough.
    """
    # A conflict that the run already has does not rule out a change.
    known = set(plan_run(config, teacher, machine, precision)["conflicts"])
    for change in _changes(config, machine):
        found = plan_run(change.apply(config), teacher, change.machine, precision)
        fits = all(stage["fits"] for stage in found["stages"])
        if fits and known.issuperset(found["conflicts"]):
            return change.settings(machine)
    return None


def _changes(config: RunConfig, machine: Machine) -> Iterator[_Change]:
    """Yield the changes to try, from the cheapest to the most expensive."""
    # A smaller micro-batch costs nothing but smaller matrix products, and gathers of the teacher.
    at_most = config.distill.micro_batch_size_per_gpu
    for size in (at_most, *_SMALLER_MICRO_BATCHES):
        fields = {"micro_batch_size_per_gpu": size} if size < at_most else {}
        if config.distill.teacher_micro_batch_size_per_gpu is not None:
            fields["teacher_micro_batch_size_per_gpu"] = size
        if fields and size <= at_most:
            yield _Change("distill", fields, machine)

    # Recomputation costs a forward pass, gathering costs bandwidth, offload loads the host's link.
    recompute: dict[str, Any] = {"activation_checkpointing": True}
    yield _Change("engine", recompute, machine)
    in_node: dict[str, Any] = {"shard_group": "node"}
    over_all: dict[str, Any] = {"shard_group": "all"}
    offload: dict[str, Any] = {"offload": "cpu"}
    for layout in (in_node, over_all, in_node | offload, over_all | offload):
        yield _Change("engine", layout, machine)
        yield _Change("engine", layout | recompute, machine)

    # More nodes are the last resort.
    for nodes in _MORE_NODES:
        if nodes > machine.nodes:
            yield _Change(
                "engine", over_all | recompute, replace(machine, nodes=nodes, nodes_of_stage={})
            )
