"""The run file's section for Slurm: what each stage asks of the cluster."""

from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from post_dist.config.sources import PositiveInt, Section

ClusterStage = Literal["distill", "tune", "transfer", "evaluate"]


class Resources(Section):
    """What a job asks for. Where a stage says nothing, the words of the `cluster` section count for it."""

    nodes: PositiveInt = 1
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """One task is started for each; 0 for a cluster without GPUs."""
    tasks_per_node: PositiveInt | None = None
    """Default gpus_per_node, or 1."""
    cpus_per_task: PositiveInt = 1
    memory: Annotated[str, Field(pattern=r"^[0-9]+[KMGT]?$")] | None = None
    """Of a node, such as 64G; default the partition's."""
    time_minutes: PositiveInt = 60
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None

    @model_validator(mode="after")
    def _one_task_a_gpu(self) -> "Resources":
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"tasks_per_node ({self.tasks_per_node}) must be gpus_per_node ({self.gpus_per_node}): one task a GPU"
            )
        return self

    @property
    def tasks(self) -> int:
        """Tasks on a node."""
        return self.tasks_per_node or self.gpus_per_node or 1


class Cluster(Resources):
    """For all stages, and for each one what differs."""

    setup: tuple[str, ...] = ()
    """Shell lines that come first in a job, such as `module load cuda`."""
    signal_seconds: PositiveInt = 120
    """How long before the time limit a job is told to save; it is then queued again, and goes on."""
    distill: Resources = Resources()
    tune: Resources = Resources()
    transfer: Resources = Resources()
    evaluate: Resources = Resources()

    @model_validator(mode="after")
    def _stages_add_up(self) -> "Cluster":
        for stage in get_args(ClusterStage):
            try:
                asked = self.for_stage(stage)
            except ValidationError as error:
                raise ValueError(
                    f"{stage}: {error.errors()[0]['msg'].removeprefix('Value error, ')}"
                ) from None
            if self.signal_seconds >= 60 * asked.time_minutes:
                raise ValueError(
                    f"{stage}: signal_seconds ({self.signal_seconds}) leaves nothing of time_minutes ({asked.time_minutes}): "
                    "the job would be told to save as it starts"
                )
        return self

    def for_stage(self, stage: ClusterStage) -> Resources:
        """What a stage asks for; tuning has one task, whose process alone sees the private data."""
        own: Resources = getattr(self, stage)
        fields = self.model_dump(include=set(Resources.model_fields)) | own.model_dump(
            exclude_unset=True
        )
        if stage == "tune":
            one = {
                "nodes": 1,
                "tasks_per_node": 1,
                "gpus_per_node": min(1, fields["gpus_per_node"]),
            }
            asked = {name for name in one if (getattr(own, name) or 0) > 1}
            if asked:
                raise ValueError(
                    f"tune.{min(asked)}: tuning runs in one process, so that private data stay there"
                )
            fields |= one
        return Resources.model_validate(fields)
