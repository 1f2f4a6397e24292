"""The run file's section for Slurm: which resources each stage requests."""

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from post_dist.config.job_options import (
    Container,
    OneLine,
    SbatchOption,
    SrunOption,
    VariableName,
)
from post_dist.config.sections import Count, PositiveInt, Section

ClusterStage = Literal["corpus", "signals", "distill", "warm_start", "tune", "transfer", "evaluate"]


def _minutes(value: Any) -> Any:
    """Return the minutes of a duration as Slurm writes it, rounded up, such as 1-12:00:00.

    Like sbatch, it reads `90` as minutes and `90:30` as minutes and seconds.
    """
    if not isinstance(value, str):
        return value
    parts = value.split("-")
    try:
        days = int(parts[0]) if len(parts) == 2 else 0
        numbers = [int(part) for part in parts[-1].split(":")]
    except ValueError:
        return value
    # After days come hours first; without days, one or two numbers begin with minutes.
    hours_first = len(parts) == 2 or len(numbers) == 3
    hours, minutes, seconds = ([*numbers, 0, 0] if hours_first else [0, *numbers, 0])[:3]
    known = len(parts) <= 2 and len(numbers) <= 3 and min(days, *numbers) >= 0
    return (days * 24 + hours) * 60 + minutes + math.ceil(seconds / 60) if known else value


Minutes = Annotated[PositiveInt, BeforeValidator(_minutes, json_schema_input_type=int | str)]

_ONE_TASK: dict[ClusterStage, str] = {
    "corpus": "tokenizing runs on one node, without GPUs",
    "tune": "tuning runs in one process, so that private data stay there",
}
"""The stages whose jobs have one task, and why."""


class Resources(Section):
    """What one job requests. A stage inherits the fields that it leaves out from `cluster`."""

    # Size of the job.
    nodes: PositiveInt = 1
    """Number of nodes."""
    gpus_per_node: Count = 0
    """GPUs on each node, with one task per GPU; 0 for a cluster without GPUs."""
    tasks_per_node: PositiveInt | None = None
    """Tasks on each node. Default: `gpus_per_node`, or 1 without GPUs."""
    cpus_per_task: PositiveInt = 1
    """CPU cores for each task."""
    memory: Annotated[str, Field(pattern=r"^[0-9]+[KMGT]?$")] | None = None
    """Memory of each node, such as 64G. Without a unit, Slurm reads megabytes. Default: the
    partition's."""
    time_minutes: Minutes = 60
    """Time limit of the job: minutes, or a duration as sbatch takes it, such as `1-12:00:00`."""
    # Where Slurm runs the job. Each field is the option of sbatch with the same name.
    partition: OneLine | None = None
    """Partition of the cluster. Default: the cluster's."""
    account: OneLine | None = None
    """Account that is charged for the job. Default: the user's."""
    qos: OneLine | None = None
    """Quality of service. Default: the cluster's."""
    constraint: OneLine | None = None
    """Features that the nodes must have, such as `a100`. Default: none."""
    reservation: OneLine | None = None
    """Reservation to run in. Default: none."""
    exclude: OneLine | None = None
    """Nodes to leave out, such as `n[3,7]`. Default: none."""
    gres: OneLine | None = None
    """Generic resources of a node, such as `gpu:h100:8`, for clusters without `--gpus-per-node`.
    That option is then left out; `gpus_per_node` still says how many tasks there are."""
    exclusive: bool = False
    """Whether no other job may use the nodes."""
    # What the cluster needs beyond that.
    mpi: OneLine | None = None
    """Kind of MPI of srun, such as `pmix`. Default: the cluster's."""
    sbatch: dict[SbatchOption, OneLine | int | bool] = Field(default_factory=dict)
    """Further options of sbatch, such as `{comment: mine, nice: 100}`."""
    srun: tuple[SrunOption, ...] = ()
    """Further options of srun, such as `[--cpu-bind=cores]`."""
    container: Container | None = None
    """Container that the tasks run in. Default: none."""

    @model_validator(mode="after")
    def _one_task_a_gpu(self) -> "Resources":
        # Each task uses one GPU. A GPU without a task would be idle.
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"tasks_per_node ({self.tasks_per_node}) must be gpus_per_node "
                f"({self.gpus_per_node}): one task a GPU"
            )
        return self

    @property
    def tasks(self) -> int:
        """Number of tasks on a node."""
        return self.tasks_per_node or self.gpus_per_node or 1


class SignalWorkers(Resources):
    """The workers of `signals`, which are a job array, and what each of them requests."""

    workers: Count = 0
    """Number of workers, for a run with `distill.cache`. `submit` starts them before `distill`,
    which trains as their files arrive. 0: `distill` writes the signals alone."""


class Cluster(Resources):
    """The resources of all stages, and the fields that differ for one stage."""

    setup: tuple[str, ...] = ()
    """Shell lines that a job runs first, such as `module load cuda`."""
    environment: dict[VariableName, OneLine] = Field(default_factory=dict)
    """Environment variables of all jobs, such as those of NCCL: `{NCCL_SOCKET_IFNAME: ib0}`."""
    signal_seconds: PositiveInt = 120
    """Seconds before the time limit at which a job gets a signal to save. Slurm then queues the
    job again, and it resumes."""
    max_restarts: Count = 10
    """Largest number of times that a job is queued again after a rank died or hung. Time limits,
    failed nodes and preemption do not count. The same failure twice at the same step ends the job,
    and so do three time limits at the same step."""
    # The fields that differ for a stage.
    corpus: Resources = Resources()
    """Resources of `corpus`, where they differ. Tokenizing has one node, one task and no GPU; its
    processes use the cores of `cpus_per_task`."""
    signals: SignalWorkers = SignalWorkers()
    """Number of workers of `signals`, and the resources of each, where they differ."""
    distill: Resources = Resources()
    """Resources of `distill`, where they differ."""
    warm_start: Resources = Resources()
    """Resources of `warm-start`, where they differ."""
    tune: Resources = Resources()
    """Resources of `tune`, where they differ. Tuning always has one node and one task."""
    transfer: Resources = Resources()
    """Resources of `transfer`, where they differ."""
    evaluate: Resources = Resources()
    """Resources of `evaluate`, where they differ."""

    @model_validator(mode="after")
    def _stages_add_up(self) -> "Cluster":
        for stage in get_args(ClusterStage):
            try:
                requested = self.for_stage(stage)
            except ValidationError as error:
                reason = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"{stage}: {reason}") from None
            if self.signal_seconds >= 60 * requested.time_minutes:
                raise ValueError(
                    f"{stage}: signal_seconds ({self.signal_seconds}) leaves nothing of "
                    f"time_minutes ({requested.time_minutes}): "
                    "the job would be told to save as it starts"
                )
        return self

    def for_stage(self, stage: ClusterStage) -> Resources:
        """Return the resources that a stage requests.

        Tuning always gets one task on one node, so that only one process sees the private data.
        Tokenizing gets one task on one node, without GPUs.

        Raises:
            ValueError: `cluster.tune` or `cluster.corpus` requests more.
        """
        own: Resources = getattr(self, stage)
        # Only the fields that the stage sets itself replace the common ones.
        fields = self.model_dump(include=set(Resources.model_fields))
        fields |= own.model_dump(exclude_unset=True, include=set(Resources.model_fields))
        if own.gres is None and fields["gres"] is not None:
            fields["gres"] = _gres_of(stage, fields["gres"])
        if stage in _ONE_TASK:
            fields |= _single_task(stage, own, fields["gpus_per_node"])
        return Resources.model_validate(fields)


def _gres_of(stage: ClusterStage, common: str) -> str | None:
    """Return the generic resources of a stage's job that asks for none of its own.

    Args:
        stage: the stage.
        common: what the other stages ask for, such as `gpu:h100:8,nvme:1`.
    """
    if stage == "corpus":
        return None
    if stage != "tune":
        return common
    # Tuning has one GPU. The other GPUs of the node would be idle.
    asked = []
    for resource in common.split(","):
        *names, count = resource.split(":")
        is_of_gpus = resource.startswith("gpu:") and count.isdecimal()
        asked.append(":".join([*names, "1"]) if is_of_gpus else resource)
    return ",".join(asked)


def _single_task(stage: ClusterStage, own: Resources, common_gpus: int) -> dict[str, int]:
    """Return the size of a stage's job that has one task.

    Args:
        stage: the stage.
        own: what the run file asks for this stage.
        common_gpus: GPUs of a node, as for the other stages.

    Raises:
        ValueError: the stage asks for more.
    """
    gpus = min(1, common_gpus) if stage == "tune" else 0
    most = {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": int(stage == "tune")}
    too_many = [name for name, limit in most.items() if (getattr(own, name) or 0) > limit]
    if too_many:
        raise ValueError(f"{stage}.{min(too_many)}: {_ONE_TASK[stage]}")
    # The other stages may use many nodes, so the common fields are overridden silently.
    return most | {"gpus_per_node": gpus}
