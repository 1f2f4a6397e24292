"""The steps that `bench scale` measures: a step of distill and one of transfer, over one teacher.

Shapes: n prompt tokens, d width.
"""

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from post_dist.artifacts.task import PromptTask
from post_dist.bench.transfer import MAX_EXAMPLES
from post_dist.config.precision import Precision
from post_dist.config.schema import RunConfig, Student
from post_dist.config.sources import Corpus, Task
from post_dist.data.corpus import PackedCorpus, build_corpus
from post_dist.data.order import RankBatch, rank_batches
from post_dist.data.public_text import load_public_texts
from post_dist.files import make_folder, write_folder, writing
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import check_has_weights, load_tokenizer, load_whole, read_config
from post_dist.models.prompt_init import prompt_from_text
from post_dist.models.student import stand_in_layers, write_student
from post_dist.runtime.distributed import World
from post_dist.stages.distill.batches import DistillationText, masking_for
from post_dist.stages.distill.model import student_engine
from post_dist.stages.distill.online_teacher import OnlineTeacher
from post_dist.stages.distill.trainer import StudentStep
from post_dist.stages.transfer.builder import ObjectiveBuilder, PublicExamples, Tokenizers
from post_dist.stages.transfer.objective import ModelPair
from post_dist.stages.transfer.step_losses import transfer_losses


@dataclass(frozen=True)
class RequiredSections:
    """The optional sections of the run file that `bench scale` needs.

    Only the template and the label words of `private_task` are used.
    """

    corpus: Corpus
    student: Student
    private_task: Task
    public_task: Task

    @classmethod
    def of_run(cls, config: RunConfig) -> "RequiredSections":
        """Return the sections of a run file.

        Raises:
            InputError: sections are missing; the message names all of them.
        """
        names = [field.name for field in fields(cls)]
        hint = "add what `bench scale` needs to the run file; no private example is read"
        return cls(*config.need_sections(*names, hint=hint))


@contextmanager
def untrained_student(
    config: RunConfig, sections: RequiredSections, teacher_folder: Path, world: World
) -> Iterator[tuple[Path, PackedCorpus]]:
    """Write an untrained student and the corpus to a folder that exists within the context.

    A step on an untrained student costs as much as a step on a trained one.

    Args:
        config: the run file.
        sections: its required sections.
        teacher_folder: folder of the teacher that the student is cut from.
        world: all ranks. Their nodes must share the folder `output`.

    Yields:
        The student's folder and the corpus.

    Raises:
        InputError: the folder `output` cannot be written to.
    """
    tokenizer = load_tokenizer(teacher_folder)
    check_has_weights(teacher_folder)
    teacher_layers = read_config(teacher_folder).get_text_config().num_hidden_layers
    layers = stand_in_layers(sections.student, teacher_layers)

    # The folder is made beside the runs, because all nodes see that file system.
    scratch = Path(world.on_main(lambda: _make_scratch(config.output)))
    try:
        student_folder = scratch / "student"
        world.on_main(
            lambda: write_folder(
                student_folder,
                lambda partial: write_student(partial, teacher_folder, layers, tokenizer),
            )
        )
        corpus = build_corpus(sections.corpus, tokenizer, scratch / "corpora", config.seed, world)
        yield student_folder, corpus
        # Rank 0 deletes the folder only when no rank reads from it any more.
        world.barrier()
    finally:
        if world.is_main:
            shutil.rmtree(scratch)


def _make_scratch(output: Path) -> str:
    make_folder(output)
    with writing(output):
        return tempfile.mkdtemp(prefix="bench-scale-", dir=output)


@dataclass(frozen=True)
class WorkloadInputs:
    """The inputs of both workloads.

    Attributes:
        sections: sections of the run file.
        teacher: the sharded teacher. It is also the target of the transfer.
        tokenizer: tokenizer of the teacher and the student.
        student_folder: folder of an untrained student.
        corpus: public text of distill.
        precision: precision of both models.
        world: all ranks.
    """

    sections: RequiredSections
    teacher: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    student_folder: Path
    corpus: PackedCorpus
    precision: Precision
    world: World

    def load_student(self) -> LanguageModel:
        """Load the whole student, which every rank holds."""
        return load_whole(self.student_folder, self.precision, self.world.device)


class Workload(ABC):
    """A training step that all ranks take together.

    Args:
        batch_size: examples of one step, over all ranks.
        amount: number of units that one step processes, over all ranks.

    Attributes:
        stage: name of the stage.
        unit: unit of the amount, `tokens` or `samples`.
    """

    stage: ClassVar[str]
    unit: ClassVar[str]

    def __init__(self, batch_size: int, amount: int) -> None:
        self.batch_size = batch_size
        self.amount = amount

    @abstractmethod
    def take_step(self, step: int) -> None:
        """Take the step of this number."""

    @abstractmethod
    def load_inputs(self, step: int) -> None:
        """Read this rank's inputs of a step onto its device, and do nothing else."""

    @abstractmethod
    def close(self) -> None:
        """Release what the step holds outside this object."""


class DistillWorkload(Workload):
    """An optimizer step of the student, including the teacher's forward pass.

    Args:
        config: the run file.
        inputs: models and text.
    """

    stage = "distill"
    unit = "tokens"

    def __init__(self, config: RunConfig, inputs: WorkloadInputs) -> None:
        batch_size = config.distill.batch_size
        super().__init__(batch_size, amount=batch_size * inputs.sections.corpus.sequence_length)
        self._section = config.distill
        self._corpus = inputs.corpus
        self._world = inputs.world

        # These calls are those of the stage, without its cache, checkpoints and schedule.
        student_section = inputs.sections.student
        self._engine = student_engine(
            inputs.load_student(), config, student_section, inputs.precision, inputs.world
        )
        masking = masking_for(inputs.teacher, inputs.tokenizer, config)
        text = DistillationText(inputs.corpus, masking, inputs.world.device)
        source = OnlineTeacher(inputs.teacher, config.distill.layers_in_teacher(student_section))
        self._student_step = StudentStep(self._engine, text, source, config.distill, inputs.world)

    def take_step(self, step: int) -> None:
        """Run the teacher, back-propagate, and update the student."""
        self._student_step.take(step)

    def load_inputs(self, step: int) -> None:
        """Read this rank's micro-batches of a step."""
        micro_batches = self._corpus.step_batches(
            step, self.batch_size, self._section.micro_batch_size_per_gpu, self._world
        )
        for micro_batch in micro_batches:
            self._corpus.training(micro_batch).to(self._world.device)

    def close(self) -> None:
        """Release DeepSpeed's engine, which registers itself in global state."""
        self._engine.destroy()


class TransferWorkload(Workload):
    """The gradient of a soft prompt for the target, averaged over all ranks.

    Outputs that do not depend on that prompt are computed once, when the workload is made. They are
    not part of the step.

    Args:
        config: the run file. Only the template and label words of the private task are used, and no
            private example is read.
        inputs: models. The prompt starts from the words of `tune.init_text`.
    """

    stage = "transfer"
    unit = "samples"

    def __init__(self, config: RunConfig, inputs: WorkloadInputs) -> None:
        sections = inputs.sections
        batch_size = config.transfer.batch_size
        super().__init__(batch_size, amount=batch_size)
        self._seed = config.seed
        self._world = inputs.world

        # The public texts come without responses, so each has one answer position in any task.
        task = replace(
            PromptTask.of_section(sections.private_task, config.tune.init_text),
            max_response_length=0,
        )
        texts = load_public_texts(sections.public_task, "public_task")[0][:MAX_EXAMPLES]
        public = PublicExamples(texts, [], sections.public_task.template)
        # The prompt's values do not change the cost of a step, so any source prompt will do.
        start_nd = prompt_from_text(
            inputs.teacher, inputs.tokenizer, task.init_text, config.tune.num_virtual_tokens
        ).float()

        # The student is cut from the target, so one tokenizer serves both.
        self._models = ModelPair(inputs.load_student(), inputs.teacher)
        tokenizers = Tokenizers(inputs.tokenizer, inputs.tokenizer)
        builder = ObjectiveBuilder(self._models, tokenizers, public, inputs.world)
        self._objective = builder.build(task, start_nd, config.transfer)
        self._prompt_nd = start_nd.to(inputs.world.device).requires_grad_(True)

    def take_step(self, step: int) -> None:
        """Back-propagate this rank's part of the batch, and average the gradient over ranks."""
        batch = self._rank_batch(step)
        (loss,) = transfer_losses(self._models, [self._objective], [self._prompt_nd], [batch.rows])
        # The weight makes the average over ranks a mean over examples.
        (batch.weight * loss).backward()
        # pyrefly: ignore[bad-argument-type]
        self._world.mean(self._prompt_nd.grad)
        self._prompt_nd.grad = None

    def load_inputs(self, step: int) -> None:
        """Read and pad this rank's part of the batch."""
        encoded = [self._objective.examples[index] for index in self._rank_batch(step).rows]
        self._objective.reader.collate(encoded).to(self._world.device)

    def close(self) -> None:
        """Do nothing: the prompt's step holds no engine."""

    def _rank_batch(self, step: int) -> RankBatch:
        # A rank runs its whole part of the batch at once.
        chosen = self._objective.batch_at(step, self._seed)
        return rank_batches(chosen, self.batch_size, self._world.rank, self._world.size)[0]
