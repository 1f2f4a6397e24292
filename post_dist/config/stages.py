"""The run file's sections for the stages: distill, tune, transfer and evaluate."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from post_dist.config.models import Student
from post_dist.config.sections import Fraction, PositiveFloat, PositiveInt, Section

OptimizerName = Literal["adam", "adamw", "sgd"]


class Distill(Section):
    """Stage 1. Weights and optimizer default to the paper's (Table 8, and its code)."""

    steps: PositiveInt = 10_000
    batch_size: PositiveInt = 32
    """Sequences in a step, over all ranks. The number of GPUs does not change what is learned."""
    micro_batch_size_per_gpu: PositiveInt = 8
    """Most sequences in one forward pass. The rest of a rank's batch is accumulated."""
    learning_rate: PositiveFloat = 2.5e-4
    warmup_share: Fraction = 0.05
    max_grad_norm: PositiveFloat = 5.0
    # The loss: the soft targets, the language modeling loss and the cosine of hidden states.
    temperature: PositiveFloat = 2.0
    alpha_ce: Annotated[float, Field(ge=0)] = 5.0
    alpha_lm: Annotated[float, Field(ge=0)] = 2.0
    alpha_cos: Annotated[float, Field(ge=0)] = 1.0
    mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Fraction of the tokens that a masked model must fill in."""
    # What is kept on disk.
    checkpoint_every_steps: PositiveInt = 500
    cache: Literal["none", "hidden", "sampled"] = "none"
    """Run the teacher once over the corpus and keep its outputs. `hidden` keeps hidden states:
    exact, some KB a token. `sampled` keeps samples of its softened distribution: unbiased, 116
    bytes a token. Later epochs and other students of this teacher then never run it. With `hidden`,
    those students must freeze the same number of lower layers."""

    def layers_in_teacher(self, student: Student) -> int:
        """Return the number of frozen layers that run in the teacher only.

        With sampled outputs it is 0: the hidden states after those layers are too large to keep.
        """
        return 0 if self.cache == "sampled" else student.frozen_lower_layers


class PromptTraining(Section):
    """What tuning and transfer share: how a soft prompt is trained."""

    steps: PositiveInt
    batch_size: PositiveInt
    """Examples in a step, over all ranks."""
    learning_rate: PositiveFloat
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_share: Fraction = 0.05


class Search(Section):
    """A private search over settings.

    It runs a random number of trials and keeps the best one by a noisy score.
    """

    mean_trials: Annotated[float, Field(gt=1)]
    """Mean of the logarithmic distribution from which the number of trials is drawn."""
    # The candidates: a trial draws one value from each list.
    learning_rate: tuple[PositiveFloat, ...] = ()
    max_grad_norm: tuple[PositiveFloat, ...] = ()
    score_noise_multiplier: PositiveFloat = 10.0
    """Standard deviation of the noise on a trial's score. The score is the number of validation
    examples that the trial classifies correctly."""

    @model_validator(mode="after")
    def _has_candidates(self) -> "Search":
        if not self.learning_rate and not self.max_grad_norm:
            raise ValueError(
                "names nothing to try: give learning_rate or max_grad_norm a list of values"
            )
        return self


class Tune(PromptTraining):
    """Stage 2. In a private run `batch_size` is the expected batch size, not a count."""

    # The prompt and its first values.
    num_virtual_tokens: Annotated[int, Field(gt=0, le=512)] = 100
    init_text: str = "Predict if the sentiment of this text is positive or negative"
    # The training.
    steps: PositiveInt = 1000
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 1e-3
    optimizer: OptimizerName = "adam"
    class_bias: bool = False
    """Tune one bias per class along with the prompt. Under privacy it is part of the clipped
    gradient and gets noise."""
    micro_batch_size_per_gpu: PositiveInt = 8
    """Examples of full length in one forward pass of private tuning. A pass of shorter examples
    holds as many as give the same number of tokens. Each pass is padded with copies."""
    search: Search | None = None

    @field_validator("init_text")
    @classmethod
    def _not_blank(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("is blank; the prompt starts from its words")
        return text


class Transfer(PromptTraining):
    """Stage 3: train a prompt for the large LLM on public text.

    `published` is (1-alpha) L1 + alpha L2 of the paper. `proxy` is the KL divergence to the
    proxy-tuned distribution.
    """

    # The loss.
    objective: Literal["published", "proxy"] = "published"
    scores: Literal["vocabulary", "classes"] = "vocabulary"
    """Compare the whole vocabulary, or only the scores of the task's classes."""
    alpha: Fraction | Literal["auto"] = 0.5
    """`auto` derives it from how often the models agree on the public text."""
    temperature: PositiveFloat = 2.0
    proxy_lambda: PositiveFloat = 1.0
    """lambda in z_t(x) + lambda (z_s(p_s+x) - z_s(x)); also used by the training-free baseline of
    the evaluation."""
    match_class_shares: bool = False
    """Shift the proxy's class scores until their mean probabilities on the public text equal those
    of the prompted student."""
    # The training.
    trained_share: Fraction = 0.0
    """Where the prompt starts: 0 from text, 1 from the tuned prompt, or between."""
    steps: PositiveInt = 5000
    batch_size: PositiveInt = 8
    learning_rate: PositiveFloat = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    prompts_at_once: PositiveInt = 4
    """Number of prompts that are trained together. Each one needs memory for its own examples."""

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
    """Table rows that need a training run of their own."""
    private_rows: tuple[PositiveFloat, ...] = ()
    """Also tune and transfer with each of these target epsilons. Each one gets table rows."""
