"""The run file's sections for the stages: distill, tune, transfer and evaluate."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from post_dist.config.models import Student
from post_dist.config.sections import (
    Fraction,
    PositiveFloat,
    PositiveInt,
    Section,
    Temperature,
    Weight,
    steers_terminal,
)

OptimizerName = Literal["adam", "adamw", "sgd", "averaged_sgd"]

AdapterName = Literal["prompt", "head", "lora", "prefix"]
"""What tuning trains."""

TransferredName = Literal["prompt", "head", "lora"]
"""What a transfer trains."""

HEAD_DEFAULTS: Mapping[str, Any] = {
    "num_virtual_tokens": 10,
    "steps": 400,
    "batch_size": 512,
    "learning_rate": 4.0,
    "schedule": "constant",
    "warmup_share": 0.0,
    "optimizer": "averaged_sgd",
}
"""Defaults of `tune` for a linear head, which is trained on features of length 1."""

_ADAPTER_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "prompt": {},
    "head": HEAD_DEFAULTS,
    "lora": {"num_virtual_tokens": 10},
    "prefix": {"num_virtual_tokens": 10},
}
"""Defaults of `tune` that differ from those of a prompt."""

PUBLISHED_TRANSFER: Mapping[str, Any] = {
    "objective": "published",
    "scores": "vocabulary",
    "temperature": 2.0,
    "match_class_shares": False,
    "trained_share": 0.0,
}
"""The paper's loss and start of the transfer."""


def _usable(text: str) -> str:
    if not text.strip():
        raise ValueError("is blank; the prompt starts from its words")
    if steers_terminal(text, lines=True):
        raise ValueError("holds control characters")
    return text


InitText = Annotated[str, AfterValidator(_usable)]


class Distill(Section):
    """Stage 1, distillation.

    Loss weights and optimizer settings default to the paper's (Table 8, and its code).
    """

    steps: PositiveInt = 10_000
    """Number of optimizer steps."""
    batch_size: PositiveInt = 32
    """Sequences in a step, over all ranks. The number of GPUs does not change what is learned."""
    micro_batch_size_per_gpu: PositiveInt = 8
    """Maximum number of sequences in one forward pass on one GPU. A larger batch takes several
    passes, whose gradients are accumulated."""
    teacher_micro_batch_size_per_gpu: PositiveInt | None = None
    """Maximum number of sequences in one forward pass of the teacher on one GPU: a multiple of
    `micro_batch_size_per_gpu`. One gather of the teacher's weights then serves several passes of
    the student. Default: `micro_batch_size_per_gpu`."""
    learning_rate: PositiveFloat = 2.5e-4
    """Highest learning rate of AdamW, after the warm-up. It then decays linearly to zero."""
    warmup_share: Fraction = 0.05
    """Fraction of the steps in which the learning rate rises from zero."""
    max_grad_norm: PositiveFloat = 5.0
    """Norm to which the gradient of a step is clipped."""
    # The loss: the soft targets, the language modeling loss and the cosine of hidden states.
    temperature: Temperature = 2.0
    """Temperature of teacher and student in the soft-target loss."""
    alpha_ce: Weight = 5.0
    """Weight of the soft-target loss: the KL divergence from the teacher's softened distribution
    to the student's."""
    alpha_lm: Weight = 2.0
    """Weight of the language modeling loss: the cross-entropy of the corpus's tokens."""
    alpha_cos: Weight = 1.0
    """Weight of the cosine loss on the last hidden states."""
    mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Fraction of the tokens that a masked model must predict."""
    # What the student gives away.
    attack_tokens: tuple[PositiveInt, ...] = ()
    """Numbers of tokens. For each, a copy of the finished student is distilled further with all of
    its layers, as an owner who wants the large LLM would do. The card has its perplexity."""
    # What is kept on disk.
    checkpoint_every_steps: PositiveInt = 500
    """Number of steps between checkpoints."""
    cache: Literal["none", "hidden", "sampled"] = "none"
    """Run the teacher once over the corpus and keep its outputs on disk. Later epochs and other
    students of this teacher then do not run it. `hidden` keeps hidden states: exact, some KB per
    token. `sampled` keeps samples of its softened distribution: unbiased, 116 bytes per token.
    Students that share a `hidden` cache must freeze the same number of lower layers."""
    cache_gib: PositiveFloat | None = None
    """Maximum size of the cache on disk, in GiB. The student trains while files arrive, and files
    that it has read make room for later ones. Only for a single epoch. The cache then belongs to
    one run. Default: no limit."""

    @model_validator(mode="after")
    def _teacher_runs_over_whole_micro_batches(self) -> "Distill":
        of_teacher = self.teacher_micro_batch_size_per_gpu
        if of_teacher is None:
            return self
        if of_teacher % self.micro_batch_size_per_gpu:
            raise ValueError(
                f"teacher_micro_batch_size_per_gpu: {of_teacher} is not a multiple of "
                f"micro_batch_size_per_gpu ({self.micro_batch_size_per_gpu})"
            )
        if self.cache != "none":
            raise ValueError(
                "teacher_micro_batch_size_per_gpu is for cache: none; "
                "a cache is written with micro_batch_size_per_gpu, which a run may change later"
            )
        return self

    @model_validator(mode="after")
    def _limit_needs_a_cache(self) -> "Distill":
        if self.cache_gib is not None and self.cache == "none":
            raise ValueError(
                "cache_gib limits a cache, and cache is none; set cache: hidden, or leave it out"
            )
        return self

    @property
    def micro_batches_per_teacher_pass(self) -> int:
        """The number of the student's micro-batches that one pass of the teacher serves."""
        of_teacher = self.teacher_micro_batch_size_per_gpu or self.micro_batch_size_per_gpu
        return of_teacher // self.micro_batch_size_per_gpu

    def layers_in_teacher(self, student: Student) -> int:
        """Return the number of frozen layers that run in the teacher only.

        It is 0 with `cache: sampled`, which does not keep the hidden states after these layers.
        """
        return 0 if self.cache == "sampled" else student.frozen_lower_layers


class PromptTraining(Section):
    """The training of a soft prompt, in tuning and transfer."""

    steps: PositiveInt
    """Number of optimizer steps."""
    batch_size: PositiveInt
    """Examples in a step, over all ranks."""
    learning_rate: PositiveFloat
    """Highest learning rate, after the warm-up."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after the warm-up: `constant`, or a `cosine` decay to zero."""
    warmup_share: Fraction = 0.05
    """Fraction of the steps in which the learning rate rises from zero."""


class Search(Section):
    """A private search over settings.

    It runs a random number of trials and keeps the one with the best noisy score.
    """

    mean_trials: Annotated[float, Field(gt=1, le=1e6)]
    """Mean number of trials. The number is drawn from a logarithmic distribution."""
    # The candidates: a trial draws one value from each list.
    learning_rate: tuple[PositiveFloat, ...] = ()
    """Learning rates to try. Default: only that of the private run."""
    max_grad_norm: tuple[PositiveFloat, ...] = ()
    """Clipping norms to try. Default: only `privacy.max_grad_norm`."""
    score_noise_multiplier: PositiveFloat = 10.0
    """Standard deviation of the noise on a trial's score. The score is the number of validation
    examples that the trial classifies correctly."""

    @property
    def candidates(self) -> dict[str, tuple[float, ...]]:
        """The values of each setting that is searched."""
        listed = {"learning_rate": self.learning_rate, "max_grad_norm": self.max_grad_norm}
        return {name: values for name, values in listed.items() if values}

    @model_validator(mode="after")
    def _has_candidates(self) -> "Search":
        if not self.candidates:
            raise ValueError(
                "names nothing to try: give learning_rate or max_grad_norm a list of values"
            )
        return self


class WarmStart(PromptTraining):
    """The public prompt: tuned on public text toward the zero-shot scores of the large LLM."""

    num_virtual_tokens: Annotated[int, Field(gt=0, le=512)] = 10
    """Number of vectors of the prompt."""
    init_text: InitText | None = None
    """The prompt starts from the embeddings of this text, repeated or cut to its length. Default: a
    sentence with the label words of the task."""
    class_shares: tuple[Annotated[float, Field(ge=1e-6, le=1e6)], ...] = ()
    """Share of each class among the texts, as far as it is known without private data. The scores
    of the large LLM are shifted to these shares. Default: equal shares."""
    head_layers: Annotated[int, Field(gt=0, le=64)] = 4
    """The untrained head of the public prompt reads the hidden states of this many layers of the
    student, the last ones. The middle of a model often knows more of a task than its end."""
    steps: PositiveInt = 100
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 1e-2


class LoraSettings(Section):
    """The layers that a LoRA changes, and its rank. The names are those of PEFT."""

    r: Annotated[int, Field(gt=0, le=256)] = 8
    """Rank of the added matrices."""
    lora_alpha: Annotated[int, Field(gt=0, le=1 << 16)] = 16
    """The added matrices are scaled by `lora_alpha / r`."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("q_proj", "v_proj")
    """Linear modules of each layer to change, by the end of their names."""
    upper_layers: PositiveInt | None = None
    """Change only this many layers, from the top. The backward pass then ends below them. Default:
    all layers."""


class AdapterTraining(PromptTraining):
    """The training of a prompt, or of an adapter behind a prompt or in its place."""

    adapter: AdapterName = "prompt"
    lora: LoraSettings | None = None
    """Settings of `adapter: lora`."""

    @property
    def lora_settings(self) -> LoraSettings:
        """The settings of a LoRA, which `adapter: lora` always has."""
        return self.lora or LoraSettings()

    @model_validator(mode="before")
    @classmethod
    def _lora_has_settings(cls, fields: Any) -> Any:
        # pydantic reports a section of another type itself.
        if isinstance(fields, dict) and fields.get("adapter") == "lora":
            return {"lora": {}, **fields}
        return fields

    @model_validator(mode="after")
    def _lora_settings_have_a_lora(self) -> Self:
        if (self.lora is None) == (self.adapter == "lora"):
            raise ValueError("lora holds the settings of adapter: lora, and of no other")
        return self


class Tune(AdapterTraining):
    """Stage 2, tuning. In a private run, `batch_size` is the expected batch size."""

    # What is tuned.
    adapter: AdapterName = "prompt"
    """`prompt` tunes the vectors of the prompt. `head` keeps a public prompt as it is, and tunes a
    linear head on the hidden states behind it. These are computed once, so that a step takes
    milliseconds. A head has its own defaults for the training. `lora` keeps the prompt as it
    starts, from a public prompt or from `init_text`, and tunes a LoRA on the student. `prefix`
    starts from the same prompt, and tunes the keys and values of its tokens in every layer of a
    causal student."""
    # The prompt and its first values.
    num_virtual_tokens: Annotated[int, Field(gt=0, le=512)] = 100
    """Number of vectors of the prompt."""
    init_text: InitText | None = None
    """The prompt starts from the embeddings of this text, repeated or cut to its length. Default: a
    sentence with the label words of the task."""
    # The training.
    steps: PositiveInt = 1000
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 1e-3
    optimizer: OptimizerName = "adam"
    """Optimizer of the tuned values. `averaged_sgd` takes the mean of the second half of the
    steps."""
    class_bias: bool = False
    """Tune one bias per class along with the prompt. In a private run, its gradient is clipped and
    gets noise together with the prompt's."""
    micro_batch_size_per_gpu: PositiveInt = 8
    """Number of examples of full length in one forward pass of private tuning. A pass of shorter
    examples holds more of them, with about as many tokens. Copies fill up a pass that is not
    full."""
    search: Search | None = None
    """Choose the learning rate or the clipping norm privately; needs `privacy.enabled`."""
    comparison_noise_multiplier: Annotated[float, Field(ge=0.2, le=1e4)] | None = None
    """After a private run, tell how many more validation examples are right than before it, with
    noise of this standard deviation. Its cost is part of the plan. Default: no comparison."""

    @property
    def counts_right(self) -> bool:
        """Whether a private run counts the validation examples that are classified correctly."""
        return self.search is not None or self.comparison_noise_multiplier is not None

    @property
    def validation_passes(self) -> float:
        """Number of passes of a private run over the validation examples; the mean for a search."""
        if not self.counts_right:
            return 0.0
        # The hidden states that a head reads are computed once.
        if self.adapter == "head":
            return 1.0
        # A comparison counts before and after the steps, and a search after each trial.
        return 2.0 if self.search is None else self.search.mean_trials

    @property
    def scores_classes_alone(self) -> bool:
        """Whether what is tuned scores the classes and no other word."""
        return self.adapter == "head"

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_adapter(cls, fields: Any) -> Any:
        # pydantic reports a section or an adapter of another type itself.
        if isinstance(fields, dict) and isinstance(fields.get("adapter"), str):
            return {**_ADAPTER_DEFAULTS.get(fields["adapter"], {}), **fields}
        return fields

    @model_validator(mode="after")
    def _fits_its_adapter(self) -> "Tune":
        if self.adapter != "prompt" and self.class_bias:
            raise ValueError(
                f"class_bias is for adapter: prompt; a {self.adapter} needs no other biases"
            )
        return self


class Transfer(AdapterTraining):
    """Stage 3, transfer: make a prompt or an adapter for the large LLM with public text."""

    # What is trained.
    adapter: TransferredName = "prompt"
    """`prompt` trains the vectors of a prompt. `lora` keeps the prompt as it starts, and trains a
    LoRA on the large LLM. `head` keeps the prompt too, and fits a linear head on hidden states of
    the LLM. The LLM then runs forward alone: `steps`, `learning_rate`, `schedule` and
    `warmup_share` do not apply. All three work with whatever was tuned on the student."""
    head_layers: Annotated[int, Field(gt=0, le=64)] = 8
    """A head reads the hidden states of this many neighboring layers of the LLM. Held-out public
    text decides which."""
    # The loss.
    objective: Literal["published", "proxy", "ensemble"] = "proxy"
    """`published`: the paper's loss, (1-alpha) L1 + alpha L2, with the paper's defaults for the
    fields below. `proxy`: the KL divergence to the proxy-tuned distribution. `ensemble`: the same
    without subtracting what the student says without the prompt."""
    scores: Literal["vocabulary", "classes"] = "classes"
    """Compare logits of the whole vocabulary, or only the scores of the task's classes. A prompt
    that generates text needs `vocabulary`."""
    alpha: Fraction | Literal["auto"] = 0.5
    """Weight of L2 in the published loss. `auto` estimates it from how often the models agree on
    the public text."""
    temperature: Temperature = 1.0
    """Temperature of the distributions that the loss compares."""
    proxy_lambda: PositiveFloat = 1.0
    """lambda of the proxy-tuned logits z_t(x) + lambda (z_s(p_s+x) - z_s(x)). `ensemble` leaves out
    the last term. The table row `proxy-tuning` uses lambda too."""
    match_class_shares: bool = True
    """Shift the proxy's class scores until their mean probabilities on the public text equal those
    of the prompted student. Default: whether class scores are compared."""
    # The training.
    trained_share: Fraction = 1.0
    """Start of the prompt: 0 for the embeddings of the initial text, 1 for the tuned prompt. Values
    between blend the two."""
    steps: PositiveInt = 5000
    batch_size: PositiveInt = 8
    learning_rate: PositiveFloat = 1e-3
    prompts_at_once: PositiveInt = 4
    """Maximum number of prompts that are trained together. Each needs memory for its examples.
    LoRAs are trained one after the other, and so are heads."""

    @property
    def trained_at_once(self) -> int:
        """Number of prompts that are trained together, if all are like this one."""
        # A forward pass has one LoRA at most.
        return 1 if self.adapter == "lora" else self.prompts_at_once

    @property
    def subtracts_student(self) -> bool:
        """Whether the wanted scores leave out what the student says without the prompt."""
        return self.objective != "ensemble"

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_objective(cls, fields: Any) -> Any:
        # pydantic reports a section of another type itself.
        if not isinstance(fields, dict):
            return fields
        if fields.get("objective") == "published":
            return {**PUBLISHED_TRANSFER, "schedule": "constant", **fields}
        if fields.get("scores") == "vocabulary":
            return {"match_class_shares": False, **fields}
        return fields

    @model_validator(mode="after")
    def _head_has_scores_to_reach(self) -> "Transfer":
        if self.adapter != "head":
            return self
        if self.objective == "published" or self.scores != "classes":
            raise ValueError(
                "adapter: head needs objective: proxy or ensemble, and scores: classes"
            )
        return self

    @model_validator(mode="after")
    def _shares_are_of_classes(self) -> "Transfer":
        if self.match_class_shares and (self.objective == "published" or self.scores != "classes"):
            raise ValueError(
                "match_class_shares needs objective: proxy or ensemble, and scores: classes"
            )
        return self


class Evaluate(Section):
    """The comparison table."""

    split: Literal["train", "validation", "test"] = "test"
    """Split of the private task to evaluate on."""
    batch_size: PositiveInt = 32
    """Number of examples that each rank runs at once."""
    baselines: tuple[Literal["published transfer", "full prompt tuning"], ...] = ()
    """Table rows that need a training run of their own. Default: none of them."""
    private_rows: tuple[PositiveFloat, ...] = ()
    """Target epsilons. For each of them a prompt is tuned and transferred, and gets table rows."""

    @property
    def trains_on_teacher(self) -> bool:
        """Whether a baseline trains a prompt on the large LLM; all of today's do."""
        return bool(self.baselines)
