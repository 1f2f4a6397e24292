"""The inputs of a plan: run file, model sizes, machine and precision."""

from dataclasses import dataclass

from post_dist.config.deepspeed import overlaps
from post_dist.config.models import Student, Teacher
from post_dist.config.precision import BYTES_PER_ELEMENT, Precision
from post_dist.config.schema import RunConfig
from post_dist.config.sources import Corpus
from post_dist.models.size import ModelSize
from post_dist.models.student import stand_in_layers
from post_dist.planning.cost import Sharding
from post_dist.planning.hardware import Machine
from post_dist.runtime.engine_conflicts import shard_group_size


@dataclass(frozen=True)
class Models:
    """Sizes of the models that a run file trains and runs.

    Attributes:
        teacher: the large model: the teacher of distillation and the target of the transfer.
        student: the student, with all its layers.
        upper: the student above its frozen layers.
        trained: number of the student's elements that are trained.
    """

    teacher: ModelSize
    student: ModelSize
    upper: ModelSize
    trained: int


def needed_sections(config: RunConfig) -> tuple[Teacher, Student, Corpus]:
    """Return the sections of the run file that every plan reads.

    Raises:
        InputError: one of them is missing.
    """
    hint = "`plan` needs them: distill is planned too, also if inputs.student gives its result"
    if config.teacher is None:
        hint = "`plan` is for the provider's run; `post-dist bench tune` times the owner's step"
    teacher, student, corpus = config.need_sections("teacher", "student", "corpus", hint=hint)
    return teacher, student, corpus


def models_of(config: RunConfig, teacher: ModelSize) -> Models:
    """Compute the sizes of the models of a run file.

    Raises:
        InputError: the run file lacks a section, or the teacher lacks the student's layers.
    """
    _, section, _ = needed_sections(config)
    # `layers: auto` chooses layers in the run. Other layers of the same number cost the same.
    student = teacher.cut(stand_in_layers(section, len(teacher.layers)))
    upper = student.above(section.frozen_lower_layers)
    # All layers above the frozen ones are trained. Head and embeddings are trained if the run file
    # asks for it. The final norm counts with the embeddings, as in `models.student.freeze`.
    trained = sum(sum(layer.weights) for layer in upper.layers)
    if not section.freeze_head:
        trained += upper.head
    if not section.freeze_embeddings:
        trained += sum(upper.others) - upper.head
    return Models(teacher, student, upper, trained)


@dataclass(frozen=True)
class PlanInputs:
    """Inputs of the plan of one stage.

    Attributes:
        config: the run file.
        models: sizes of its models.
        machine: the nodes and GPUs that run the stage.
        precision: precision of weights and activations.
    """

    config: RunConfig
    models: Models
    machine: Machine
    precision: Precision

    @property
    def bytes_each(self) -> int:
        """Bytes of one weight."""
        return BYTES_PER_ELEMENT[self.precision]

    @property
    def group(self) -> int:
        """Number of ranks that share one copy of a frozen model."""
        return shard_group_size(self.config.engine, self.machine.layout)

    @property
    def sharding(self) -> Sharding:
        """The division of the weights among the ranks."""
        return Sharding(self.machine.ranks, self.group, self.bytes_each)

    @property
    def overlap(self) -> bool:
        """Whether collectives run beside computation: by the hardware and by DeepSpeed."""
        return self.machine.hardware.overlap and overlaps(self.config.engine)

    @property
    def flops_per_second(self) -> float:
        """Operations per second that matrix products reach on one GPU."""
        return self.machine.hardware.flops_per_second(self.precision)

    def utilization(self, flops: float, seconds: float) -> float:
        """Compute the fraction of a GPU's peak operations that a step uses."""
        return flops / seconds / (self.machine.hardware.teraflops[self.precision] * 1e12)

    def text_lengths(self) -> tuple[int, int]:
        """Return the maximum number of tokens of a text, and of its response (0 for classes)."""
        # A provider plans without the private task. Its public task has texts of similar length.
        task = self.config.private_task or self.config.public_task
        if task is None:
            return 128, 0
        return task.max_length, task.response_length
