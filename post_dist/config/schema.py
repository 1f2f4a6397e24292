"""The run file's sections. Frozen, and every unknown key is an error.

A stage sees only the sections that it reads (`RunConfig.view`), so the provider's stages cannot reach the private task.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from post_dist.config.cluster import Cluster
from post_dist.config.sources import (
    Corpus,
    FilePath,
    Fraction,
    PositiveFloat,
    PositiveInt,
    Section,
    Task,
    beside_run_file,
)
from post_dist.errors import InputError

Stage = Literal["distill", "tune", "transfer", "evaluate"]
OptimizerName = Literal["adam", "adamw", "sgd"]

STAGE_SECTIONS: dict[Stage, tuple[str, ...]] = {
    "distill": ("teacher", "student", "corpus", "distill", "engine"),
    "tune": ("private_task", "privacy", "tune", "engine"),
    "transfer": ("teacher", "public_task", "transfer", "engine"),
    "evaluate": ("teacher", "private_task", "transfer", "evaluate", "engine"),
}
"""What each stage reads, beside the general fields and the artifacts that it is handed."""
_ORDER = tuple(STAGE_SECTIONS)


class Teacher(Section):
    """The provider's large LLM: the teacher in distillation, the target in transfer."""

    path: str
    """A folder in Hugging Face format, or a hub name."""
    revision: str | None = None
    """The commit of a hub model; required with a hub name, so that a run names one model for ever."""

    @field_validator("path")
    @classmethod
    def _local_folder_beside_run_file(cls, path: str, info: ValidationInfo) -> str:
        local = beside_run_file(Path(path), info)
        return str(local) if local.exists() or path.startswith((".", "/", "~")) else path

    @model_validator(mode="after")
    def _hub_name_needs_revision(self) -> "Teacher":
        if not Path(self.path).is_absolute() and not self.revision:
            raise ValueError(
                f"'{self.path}' is not a folder; a hub name needs `revision` (a commit)"
            )
        return self


class Student(Section):
    """Which layers of the teacher make the student, and what of it stays as copied."""

    layers: Literal["first_last", "even", "auto"] | tuple[int, ...] = "first_last"
    num_layers: PositiveInt | None = None
    """How many layers; required unless `layers` is a list."""
    frozen_lower_layers: Annotated[int, Field(ge=0)] = 0
    """The student's first layers that are not trained. They must be the teacher's own first layers, and run once for both."""
    freeze_embeddings: bool = True
    freeze_head: bool = True

    @model_validator(mode="after")
    def _layers_and_number_agree(self) -> "Student":
        if isinstance(self.layers, str):
            if self.num_layers is None:
                raise ValueError(f"layers: {self.layers} needs num_layers")
            if self.layers == "first_last" and self.num_layers < 2:
                raise ValueError("layers: first_last needs num_layers of 2 or more")
        else:
            if (
                not self.layers
                or list(self.layers) != sorted(set(self.layers))
                or self.layers[0] < 0
            ):
                raise ValueError("a list of layers holds rising numbers from 0, at least one")
            if self.num_layers not in (None, len(self.layers)):
                raise ValueError(
                    f"num_layers is {self.num_layers}, but {len(self.layers)} layers are listed"
                )
        count = self.num_layers or len(self.layers)
        if self.frozen_lower_layers >= count:
            raise ValueError(
                f"frozen_lower_layers: {self.frozen_lower_layers} leaves none of {count} layers to train"
            )
        if self.frozen_lower_layers and not self.freeze_embeddings:
            raise ValueError(
                "frozen_lower_layers needs freeze_embeddings: true, for the block stands on the teacher's embeddings"
            )
        return self


class Distill(Section):
    """Stage 1. The defaults of weights and optimizer are the paper's (Table 8, and its code)."""

    steps: PositiveInt = 10_000
    batch_size: PositiveInt = 32
    """Sequences a step, over all ranks: how many GPUs there are does not change what is learned."""
    micro_batch_size_per_gpu: PositiveInt = 8
    """At most so many sequences in one forward; what is left of a rank's share is accumulated."""
    learning_rate: PositiveFloat = 2.5e-4
    warmup_share: Fraction = 0.05
    max_grad_norm: PositiveFloat = 5.0
    temperature: PositiveFloat = 2.0
    alpha_ce: Annotated[float, Field(ge=0)] = 5.0
    alpha_lm: Annotated[float, Field(ge=0)] = 2.0
    alpha_cos: Annotated[float, Field(ge=0)] = 1.0
    mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Fraction of tokens that a masked model must fill in."""
    checkpoint_every_steps: PositiveInt = 500
    cache: Literal["none", "hidden", "sampled"] = "none"
    """Run the teacher once over the corpus and keep what it says: hidden states, exact and some KB a token; or samples of its softened
    distribution, right on average and 116 bytes a token. Later epochs and other students of the same teacher then never run it; with
    hidden states, those that freeze as many lower layers."""

    def layers_in_teacher(self, student: Student) -> int:
        """How many frozen layers run in the teacher alone. What they make is too much to be kept beside samples."""
        return 0 if self.cache == "sampled" else student.frozen_lower_layers


class PromptTraining(Section):
    """What tuning and transfer share: how a soft prompt is trained."""

    steps: PositiveInt
    batch_size: PositiveInt
    """Rows a step, over all ranks."""
    learning_rate: PositiveFloat
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_share: Fraction = 0.05


class Search(Section):
    """Which settings a private search may try; it runs a random number of them and keeps the best by a noisy score."""

    mean_trials: Annotated[float, Field(gt=1)]
    """Mean of the logarithmic distribution that the number of trials is drawn from."""
    learning_rate: tuple[PositiveFloat, ...] = ()
    max_grad_norm: tuple[PositiveFloat, ...] = ()
    score_noise_multiplier: PositiveFloat = 10.0
    """Standard deviation of the noise on a trial's score, the number of validation rows that it gets right."""

    @model_validator(mode="after")
    def _has_candidates(self) -> "Search":
        if not self.learning_rate and not self.max_grad_norm:
            raise ValueError(
                "names nothing to try: give learning_rate or max_grad_norm a list of values"
            )
        return self


class Tune(PromptTraining):
    """Stage 2. In a private run `batch_size` is the expected number of rows a step: a constant, not a count."""

    num_virtual_tokens: Annotated[int, Field(gt=0, le=512)] = 100
    init_text: str = "Predict if the sentiment of this text is positive or negative"
    steps: PositiveInt = 1000
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 1e-3
    optimizer: OptimizerName = "adam"
    class_bias: bool = False
    """Tune one bias per class along with the prompt; under privacy it shares the clip and the noise."""
    micro_batch_size_per_gpu: PositiveInt = 8
    """Rows of the greatest length in one forward pass of private tuning, and as many more of shorter ones as make the same tokens; each
    pass is filled up with copies."""
    search: Search | None = None

    @field_validator("init_text")
    @classmethod
    def _not_blank(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("is blank; the prompt starts from its words")
        return text


class Privacy(Section):
    """The plan of a private run. All of it is public: nothing here may be computed from the private data."""

    enabled: bool = False
    target_epsilon: PositiveFloat | None = None
    """The noise is then the least that keeps epsilon; otherwise give `noise_multiplier`."""
    noise_multiplier: Annotated[float, Field(ge=0.2)] | None = None
    """sigma: the noise's standard deviation over `max_grad_norm`; with less than 0.2 epsilon is beyond use."""
    declared_examples: Annotated[int, Field(gt=1, le=10**9)] | None = None
    """A public figure for how many rows there are to train on, from which `target_delta` and the sampling probability follow."""
    target_delta: Annotated[float, Field(ge=1e-10, lt=1)] | None = None
    """Default declared_examples^-1.1. Below 1e-10 the accountants' rounding is as large, and they no longer agree."""
    sampling_probability: Annotated[float, Field(gt=0, le=1)] | None = None
    """q: the chance of each example to be in a step. Default expected_batch_size / declared_examples."""
    expected_batch_size: PositiveFloat | None = None
    """What the noisy sum is divided by; default tune.batch_size."""
    steps: PositiveInt | None = None
    """Steps of the private run; default tune.steps."""
    learning_rate: PositiveFloat | None = None
    """Of the private run; default tune.learning_rate."""
    max_grad_norm: PositiveFloat = 1.0
    """C: the Euclidean norm to which each example's gradient is clipped."""
    max_total_epsilon: PositiveFloat | None = None
    """Refuse a run that would take the sum of all runs on this data set past this epsilon."""
    ledger: FilePath | None = None
    """Where the data set's spending is recorded; default beside a local data file, with `.ledger.jsonl` at its end."""
    noise_source: Literal["system", "seeded"] = "system"
    """`seeded` repeats its noise, for tests: what it makes is NOT private."""

    def for_target(self, epsilon: float) -> "Privacy":
        """The same plan, enabled, with the noise for an epsilon."""
        return Privacy.model_validate(
            self.model_dump()
            | {"enabled": True, "target_epsilon": epsilon, "noise_multiplier": None}
        )

    @model_validator(mode="after")
    def _complete(self) -> "Privacy":
        if not self.enabled:
            return self
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give either target_epsilon or noise_multiplier")
        if self.declared_examples is None and (
            self.target_delta is None or self.sampling_probability is None
        ):
            raise ValueError(
                "give declared_examples, or both target_delta and sampling_probability"
            )
        return self


class Transfer(PromptTraining):
    """Stage 3: `published` is (1-alpha) L1 + alpha L2 of the paper, `proxy` is KL toward the proxy-tuned distribution."""

    objective: Literal["published", "proxy"] = "published"
    scores: Literal["vocabulary", "classes"] = "vocabulary"
    """Compare the whole vocabulary, or the scores of the task's classes alone."""
    alpha: Fraction | Literal["auto"] = 0.5
    """`auto` takes it from how often the models agree on the public text."""
    temperature: PositiveFloat = 2.0
    proxy_lambda: PositiveFloat = 1.0
    """lambda in z_t(x) + lambda (z_s(p_s+x) - z_s(x)); also used by the training-free row of the evaluation."""
    match_class_shares: bool = False
    """Shift the proxy's class scores until their mean probabilities on the public text are the prompted student's."""
    trained_share: Fraction = 0.0
    """Where the prompt starts: 0 from text, 1 from the tuned prompt, or between."""
    steps: PositiveInt = 5000
    batch_size: PositiveInt = 8
    learning_rate: PositiveFloat = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    prompts_at_once: PositiveInt = 4
    """How many prompts are trained beside each other where there are several; each needs the memory of its own rows."""

    @model_validator(mode="after")
    def _shares_are_of_classes(self) -> "Transfer":
        if self.match_class_shares and (self.objective, self.scores) != ("proxy", "classes"):
            raise ValueError("match_class_shares needs objective: proxy and scores: classes")
        return self


class Evaluate(Section):
    """The comparison table."""

    split: Literal["train", "validation", "test"] = "test"
    batch_size: PositiveInt = 32
    baselines: tuple[Literal["published transfer", "full prompt tuning"], ...] = ()
    """Rows that need a training run of their own."""
    private_rows: tuple[PositiveFloat, ...] = ()
    """Also tune and transfer with each of these target epsilons, for rows of their own."""


class Engine(Section):
    """DeepSpeed: how models are laid out over the ranks. Only `precision` changes what a stage makes."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """Of the student; frozen large models are ZeRO-3."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    shard_group: Literal["all", "node"] | PositiveInt = "all"
    """How many ranks share one copy of a frozen large model: all, those of a node, or so many neighbours; 1 gives each its own."""
    quantized_gathers: bool = False
    """ZeRO++: frozen weights travel as int8, which changes them a little. GPUs only."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where the shards of frozen large models lie while they are not needed."""
    nvme_folder: FilePath | None = None
    """A folder on each node's own disk, for `offload: nvme`."""
    offload_optimizer: bool = False
    """Keep and step the student's optimizer in host memory; with zero_stage 1 or more."""
    activation_checkpointing: bool = False
    """Compute layers a second time in the backward pass instead of keeping what they made."""
    hang_timeout_seconds: PositiveFloat = 1800.0
    """A process that has not moved for so long says where it stood, and ends."""

    @model_validator(mode="after")
    def _layout_is_possible(self) -> "Engine":
        if (self.offload == "nvme") != (self.nvme_folder is not None):
            raise ValueError("offload: nvme and nvme_folder go together")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.shard_group == 1 and (self.offload != "none" or self.quantized_gathers):
            raise ValueError(
                "shard_group: 1 keeps frozen models whole on each rank: nothing to offload or to gather"
            )
        return self


class Inputs(Section):
    """Artifacts that came from the other party: the stage that would make one is not run."""

    student: FilePath | None = None
    """A student that was distilled, or any model folder: a smaller one of the teacher's family, or one with another tokenizer."""
    source_prompt: FilePath | tuple[FilePath, ...] | None = None
    """One prompt, or for `transfer` those of several owners."""
    target_prompt: FilePath | None = None


class RunConfig(Section):
    """One run file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    output: FilePath = Field(default=Path("runs"), validate_default=True)
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    inputs: Inputs = Inputs()
    teacher: Teacher | None = None
    student: Student | None = None
    corpus: Corpus | None = None
    private_task: Task | None = None
    public_task: Task | None = None
    distill: Distill = Distill()
    privacy: Privacy = Privacy()
    tune: Tune = Tune()
    transfer: Transfer = Transfer()
    evaluate: Evaluate = Evaluate()
    engine: Engine = Engine()
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _private_task_is_whole(self) -> "RunConfig":
        if self.private_task is None:
            return self
        if self.private_task.visibility != "private":
            raise ValueError("private_task.visibility must be private")
        if self.private_task.template is None:
            raise ValueError("private_task.template is missing")
        if self.private_task.response_column is None:
            if len(self.private_task.labels) < 2:
                raise ValueError(
                    "private_task.labels must give the words of two classes or more, or response_column a column of texts"
                )
            return self
        if self.private_task.labels:
            raise ValueError("private_task has labels and a response_column: give one of them")
        for of_classes, used in {
            "tune.class_bias": self.tune.class_bias,
            "tune.search": self.tune.search is not None,
        }.items():
            if used:
                raise ValueError(
                    f"{of_classes} is for tasks with classes, and private_task.response_column makes one that generates text"
                )
        return self

    @model_validator(mode="after")
    def _private_run_adds_up(self) -> "RunConfig":
        rows, declared = (
            self.privacy.expected_batch_size or self.tune.batch_size,
            self.privacy.declared_examples,
        )
        private = self.privacy.enabled or bool(self.evaluate.private_rows)
        if self.privacy.sampling_probability is None and declared and rows > declared:
            raise ValueError(
                f"the expected batch size ({rows:g}) exceeds privacy.declared_examples ({declared})"
            )
        if private and self.private_task is not None and self.private_task.max_rows is not None:
            raise ValueError(
                "private_task.max_rows does not go with privacy.enabled: one row more would push another one out"
            )
        if self.tune.search is not None and not self.privacy.enabled:
            raise ValueError(
                "tune.search needs privacy.enabled: true; a search that looks at private scores is not free"
            )
        for epsilon in self.evaluate.private_rows:
            self.privacy.for_target(epsilon)
        return self

    @property
    def all_privacy(self) -> list[Privacy]:
        """What each prompt is tuned with: the run file's own section, and one for each of `evaluate.private_rows`."""
        return [self.privacy, *map(self.privacy.for_target, self.evaluate.private_rows)]

    def stages_until(self, stage: Stage) -> tuple[Stage, ...]:
        """A stage, and before it those whose result it builds on and `inputs` does not give; a data owner's builds on no transfer."""
        inputs, no_transfer = self.inputs, self.teacher is None and not self.evaluate.baselines
        given = {
            "distill": inputs.student,
            "tune": inputs.source_prompt,
            "transfer": inputs.target_prompt or no_transfer,
        }
        before = _ORDER[: _ORDER.index(stage)]
        return (*(earlier for earlier in before if not given[earlier]), stage)

    def need(self, *stages: Stage) -> None:
        """See that the sections are there which these stages read and no default fills in.

        A data owner evaluates without a teacher; what was or will be trained on the teacher needs it.

        Raises:
            InputError: some are missing.
        """
        read = dict.fromkeys(section for stage in stages for section in STAGE_SECTIONS[stage])
        if not {"distill", "transfer"} & {*stages} and not (
            self.evaluate.baselines or self.inputs.target_prompt
        ):
            read.pop("teacher", None)
        missing = [section for section in read if getattr(self, section) is None]
        if missing:
            raise InputError(
                f"the run file lacks the section{'s' * (len(missing) > 1)} {', '.join(missing)}"
            )

    def view(self, stage: Stage) -> "RunConfig":
        """The run file with every section blanked that `stage` does not read."""
        general = ("name", "output", "seed", "inputs")
        kept = {key: getattr(self, key) for key in (*general, *STAGE_SECTIONS[stage])}
        if not self.privacy.enabled:  # a plan that is not used changes nothing
            kept.pop("privacy", None)
        return RunConfig.model_construct(**kept)
