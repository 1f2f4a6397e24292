"""The run file's section for Slurm: which resources each stage requests."""

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, ValidationError, model_validator

from post_dist.config.sections import PositiveInt, Section

ClusterStage = Literal["corpus", "distill", "warm_start", "tune", "transfer", "evaluate"]


def _one_line(text: str) -> str:
    """Refuse a text that would end the line of a batch file, or is none."""
    if not text.isprintable() or not text.strip():
        raise ValueError("must be one line of printable characters")
    return text


_ONE_TASK: dict[ClusterStage, str] = {
    "corpus": "tokenizing runs on one node, without GPUs",
    "tune": "tuning runs in one process, so that private data stay there",
}
"""The stages whose jobs have one task, and why."""

OneLine = Annotated[str, AfterValidator(_one_line)]
"""The value of an option of sbatch."""


class Resources(Section):
    """What one job requests. A stage inherits the fields that it leaves out from `cluster`."""

    # Size of the job.
    nodes: PositiveInt = 1
    """Number of nodes."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """GPUs on each node, with one task per GPU; 0 for a cluster without GPUs."""
    tasks_per_node: PositiveInt | None = None
    """Tasks on each node. Default: `gpus_per_node`, or 1 without GPUs."""
    cpus_per_task: PositiveInt = 1
    """CPU cores for each task."""
    memory: Annotated[str, Field(pattern=r"^[0-9]+[KMGT]?$")] | None = None
    """Memory of each node, such as 64G. Without a unit, Slurm reads megabytes. Default: the
    partition's."""
    time_minutes: PositiveInt = 60
    """Time limit of the job, in minutes."""
    # Where Slurm runs the job. Each field is the option of sbatch with the same name.
    partition: OneLine | None = None
    """Partition of the cluster. Default: the cluster's."""
    account: OneLine | None = None
    """Account that is charged for the job. Default: the user's."""
    qos: OneLine | None = None
    """Quality of service. Default: the cluster's."""
    constraint: OneLine | None = None
    """Features that the nodes must have, such as `a100`. Default: none."""

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


class Cluster(Resources):
    """The resources of all stages, and the fields that differ for one stage."""

    setup: tuple[str, ...] = ()
    """Shell lines that a job runs first, such as `module load cuda`."""
    signal_seconds: PositiveInt = 120
    """Seconds before the time limit at which a job gets a signal to save. Slurm then queues the
    job again, and it resumes."""
    # The fields that differ for a stage.
    corpus: Resources = Resources()
    """Resources of `corpus`, where they differ. Tokenizing has one node, one task and no GPU; its
    processes use the cores of `cpus_per_task`."""
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
        fields |= own.model_dump(exclude_unset=True)
        if stage in _ONE_TASK:
            fields |= _single_task(stage, own, fields["gpus_per_node"])
        return Resources.model_validate(fields)


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
