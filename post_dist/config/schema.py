"""The run file as a whole, and the sections that each stage sees.

A stage sees only the sections that it reads (`RunConfig.view`). So the provider's stages cannot
reach the private task.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from post_dist.config.cluster import Cluster
from post_dist.config.models import Engine, Student, Teacher
from post_dist.config.privacy import Privacy
from post_dist.config.public_keys import PublicKey
from post_dist.config.sections import FilePath, FilePaths, Section
from post_dist.config.sources import Corpus, Task
from post_dist.config.stages import (
    Distill,
    Evaluate,
    OptimizerName,
    PromptTraining,
    Search,
    Transfer,
    Tune,
    WarmStart,
)
from post_dist.config.tracking import Tracking
from post_dist.errors import InputError

__all__ = [
    "STAGE_SECTIONS",
    "Cluster",
    "Corpus",
    "Distill",
    "Engine",
    "Evaluate",
    "Inputs",
    "OptimizerName",
    "Privacy",
    "PromptTraining",
    "RunConfig",
    "Search",
    "Stage",
    "Student",
    "Task",
    "Teacher",
    "Tracking",
    "Transfer",
    "Tune",
    "WarmStart",
]

Stage = Literal["distill", "warm_start", "tune", "transfer", "evaluate"]

STAGE_SECTIONS: dict[Stage, tuple[str, ...]] = {
    "distill": ("teacher", "student", "corpus", "distill", "engine"),
    "warm_start": ("teacher", "public_task", "warm_start", "engine"),
    "tune": ("private_task", "privacy", "tune", "engine"),
    "transfer": ("teacher", "public_task", "transfer", "engine"),
    "evaluate": ("teacher", "private_task", "transfer", "evaluate", "engine"),
}
"""The sections that each stage reads, besides the general fields and its input artifacts."""

_ORDER = tuple(STAGE_SECTIONS)
_GENERAL_FIELDS = ("name", "output", "seed", "inputs")


class Inputs(Section):
    """Artifacts from the other party. The stage that would make one is skipped."""

    student: FilePath | None = None
    """Folder of a distilled student, or of any other model. It may be a smaller model of the
    teacher's family, or have another tokenizer. A folder without `post_dist.json` is refused,
    unless `trust_model` is true."""
    trust_model: bool = False
    """Use a `student` without `post_dist.json`. It is not checked, so it must be a model of your
    own. The option `--trust-model` sets this field."""
    public_prompt: FilePath | None = None
    """Folder of a public prompt for the student, which `post-dist warm-start` made. Tuning starts
    from it."""
    source_prompt: FilePath | FilePaths | None = None
    """Folder of a prompt that was tuned on the student. For `transfer`, it may be a list of the
    prompts of several owners."""
    target_prompt: FilePath | None = None
    """Folder of a prompt for the large LLM, for `evaluate`."""
    trusted_keys: tuple[PublicKey, ...] = ()
    """Public keys of the other party, each as a line of a `.pub` file. Every artifact of `inputs`
    must then be signed by one of them. Default: artifacts need no signature."""


class RunConfig(Section):
    """One run file."""

    # The run, and what it starts from.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Name of the run. Its stages write to `output/name`."""
    output: FilePath = Field(default=Path("runs"), validate_default=True)
    """Folder for all runs. Default: `runs` beside the run file."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of everything random but the noise and the sampling of private tuning."""
    inputs: Inputs = Inputs()
    """Artifacts from the other party."""
    # Models and data.
    teacher: Teacher | None = None
    """The provider's large LLM."""
    student: Student | None = None
    """The student, which is cut from the teacher."""
    corpus: Corpus | None = None
    """Public text for distillation."""
    private_task: Task | None = None
    """The owner's task and labeled examples."""
    public_task: Task | None = None
    """Public text for the transfer and the warm start. Its column of labels is not read."""
    # The stages.
    distill: Distill = Distill()
    """Settings of distillation."""
    privacy: Privacy = Privacy()
    """The plan of private tuning."""
    warm_start: WarmStart | None = None
    """Settings of the public prompt that tuning starts from. Default: tuning starts from text."""
    tune: Tune = Tune()
    """Settings of tuning."""
    transfer: Transfer = Transfer()
    """Settings of the transfer."""
    evaluate: Evaluate = Evaluate()
    """Settings of the comparison table."""
    # Where they run.
    engine: Engine = Engine()
    """Precision, and layout of the models over the ranks."""
    cluster: Cluster = Cluster()
    """Resources of Slurm jobs."""
    tracking: Tracking = Tracking()
    """Trackers of public metrics."""

    @model_validator(mode="after")
    def _private_task_is_whole(self) -> "RunConfig":
        task = self.private_task
        if task is None:
            return self
        if task.visibility != "private":
            raise ValueError("private_task.visibility must be private")
        if task.template is None:
            raise ValueError("private_task.template is missing")
        if task.response_column is None and len(task.labels) < 2:
            raise ValueError(
                "private_task.labels must give the words of two classes or more, "
                "or response_column a column of texts"
            )
        return self

    @model_validator(mode="after")
    def _generating_task_has_no_classes(self) -> "RunConfig":
        task = self.private_task
        if task is None or task.response_column is None:
            return self
        if task.labels:
            raise ValueError("private_task has labels and a response_column: give one of them")
        needs_classes = {
            "tune.class_bias": self.tune.class_bias,
            "tune.search": self.tune.search is not None,
            "tune.comparison_noise_multiplier": self.tune.comparison_noise_multiplier is not None,
        }
        for field, is_set in needs_classes.items():
            if is_set:
                raise ValueError(
                    f"{field} is for tasks with classes, "
                    "and private_task.response_column makes one that generates text"
                )
        return self

    @model_validator(mode="after")
    def _signals_have_a_reader(self) -> "RunConfig":
        # The workers would take hours to write files that nothing reads.
        if self.cluster.signals.workers and self.distill.cache == "none":
            raise ValueError(
                "cluster.signals.workers is for a run whose distill.cache is hidden or sampled"
            )
        return self

    @model_validator(mode="after")
    def _tuning_fits_its_start(self) -> "RunConfig":
        # The provider's run file has no private task, and its section `tune` is not read.
        start = self.warm_start
        if start is None or self.private_task is None:
            return self
        if start.num_virtual_tokens != self.tune.num_virtual_tokens:
            raise ValueError(
                f"warm_start.num_virtual_tokens ({start.num_virtual_tokens}) is not "
                f"tune.num_virtual_tokens ({self.tune.num_virtual_tokens}): give both the same"
            )
        return self

    @model_validator(mode="after")
    def _adapter_fits_the_task(self) -> "RunConfig":
        name = f"tune.adapter: {self.tune.adapter}"
        if self.tune.scores_classes_alone:
            if self.private_task is not None and self.private_task.response_column is not None:
                raise ValueError(f"{name} is for tasks with classes")
            if self.transfer.scores != "classes" and self.teacher is not None:
                raise ValueError(
                    f"{name} scores the classes and no other word: set transfer.scores: classes"
                )
        if self.tune.adapter != "prompt" and self.evaluate.baselines:
            raise ValueError(
                f"{name} has nothing in common with the baselines, which tune a prompt: "
                "remove evaluate.baselines"
            )
        return self

    @model_validator(mode="after")
    def _private_run_adds_up(self) -> "RunConfig":
        # Otherwise the sampling probability, one divided by the other, would exceed 1.
        expected = self.privacy.expected_batch_size or self.tune.batch_size
        declared = self.privacy.declared_examples
        if self.privacy.sampling_probability is None and declared and expected > declared:
            raise ValueError(
                f"the expected batch size ({expected:g}) "
                f"exceeds privacy.declared_examples ({declared})"
            )

        # With a limit on the number of examples, adding one can remove another. That is twice the
        # change that the privacy plan assumes.
        is_private = self.privacy.enabled or bool(self.evaluate.private_rows)
        has_limit = self.private_task is not None and self.private_task.max_rows is not None
        if is_private and has_limit:
            raise ValueError(
                "private_task.max_rows does not go with privacy.enabled: "
                "one more example would push another one out"
            )
        if self.tune.search is not None and not self.privacy.enabled:
            raise ValueError(
                "tune.search needs privacy.enabled: true; "
                "a search that looks at private scores is not free"
            )

        # One person may have any number of validation examples, which the noise on a count does not
        # cover.
        compares = self.tune.comparison_noise_multiplier is not None
        counting = {
            "tune.search": self.tune.search is not None,
            "tune.comparison_noise_multiplier": compares,
        }
        for field, is_set in counting.items():
            if is_set and self.protects_users:
                raise ValueError(
                    f"{field} does not go with private_task.user_column: "
                    "it counts examples, not people"
                )
        if compares and self.tune.search is not None:
            raise ValueError(
                "tune.comparison_noise_multiplier does not go with tune.search, "
                "which compares its own trials"
            )

        # Each of these epsilons makes a plan of its own, with the same checks.
        for epsilon in self.evaluate.private_rows:
            self.privacy.for_target(epsilon)
        return self

    @property
    def protects_users(self) -> bool:
        """Whether the unit of privacy is a user, and not an example."""
        return self.private_task is not None and self.private_task.user_column is not None

    @property
    def all_privacy(self) -> list[Privacy]:
        """The run file's own plan, and one for each epsilon of `evaluate.private_rows`."""
        return [self.privacy, *map(self.privacy.for_target, self.evaluate.private_rows)]

    def stages_until(self, stage: Stage) -> tuple[Stage, ...]:
        """Return the stages that must run for a stage, in order; the stage itself comes last.

        Stages whose results `inputs` gives are left out. A data owner without a teacher evaluates
        without a transfer.
        """
        inputs = self.inputs
        needs_no_transfer = self.teacher is None and not self.evaluate.trains_on_teacher
        # Whether an input replaces the stage.
        given = {
            "distill": bool(inputs.student),
            "warm_start": self.warm_start is None or bool(inputs.public_prompt),
            "tune": bool(inputs.source_prompt),
            "transfer": bool(inputs.target_prompt) or needs_no_transfer,
        }
        before = _ORDER[: _ORDER.index(stage)]
        return (*(earlier for earlier in before if not given[earlier]), stage)

    def need(self, *stages: Stage) -> None:
        """Check that the run file has all sections that these stages read.

        A data owner may evaluate without a teacher, unless a prompt was or will be trained on it.

        Raises:
            InputError: sections without a default are missing.
        """
        # A dict keeps the order and holds each section once.
        read = dict.fromkeys(section for stage in stages for section in STAGE_SECTIONS[stage])
        trains_on_teacher = "distill" in stages or "transfer" in stages
        trains_on_teacher = trains_on_teacher or self.evaluate.trains_on_teacher
        if not trains_on_teacher and not self.inputs.target_prompt:
            read.pop("teacher", None)
        self.need_sections(*read)

    def need_sections(self, *names: str, hint: str = "") -> list[Any]:
        """Return sections without a default.

        Args:
            names: their names.
            hint: hint of the error.

        Raises:
            InputError: some of them are missing; the message names these.
        """
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            plural = "s" if len(missing) > 1 else ""
            raise InputError(f"the run file lacks the section{plural} {', '.join(missing)}", hint)
        return [getattr(self, name) for name in names]

    def need_task(self, role: Literal["private_task", "public_task"]) -> Task:
        """Return the section of a task.

        Raises:
            InputError: the run file lacks it.
        """
        task: Task | None = getattr(self, role)
        if task is None:
            raise InputError(f"the run file lacks the section {role}")
        return task

    def view(self, stage: Stage) -> "RunConfig":
        """Return the run file without the sections that `stage` does not read."""
        kept = {name: getattr(self, name) for name in (*_GENERAL_FIELDS, *STAGE_SECTIONS[stage])}
        # A stage with private data knows no tracker. The signature does not cover the section.
        if "private_task" not in STAGE_SECTIONS[stage]:
            kept["tracking"] = self.tracking
        # Private tuning is one process without DeepSpeed.
        if stage == "tune":
            kept["engine"] = self.engine.model_copy(update={"deepspeed": None})
        if not self.privacy.enabled:
            # A plan that is not used must not change the signature of the stage.
            kept.pop("privacy", None)
        return RunConfig.model_construct(**kept)
