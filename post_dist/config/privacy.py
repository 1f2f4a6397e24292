"""The run file's section for differential privacy: the plan of a private run."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from post_dist.config.sections import FilePath, PositiveFloat, PositiveInt, Section


class Privacy(Section):
    """The plan of a private run. It is public: nothing here may be computed from private data."""

    enabled: bool = False

    # The noise: give one of these.
    target_epsilon: PositiveFloat | None = None
    """Choose the least noise that meets this epsilon; otherwise give `noise_multiplier`."""
    noise_multiplier: Annotated[float, Field(ge=0.2)] | None = None
    """sigma: standard deviation of the noise, divided by `max_grad_norm`. Below 0.2 the epsilon is
    too large to be of use."""
    # The data set, by public numbers.
    declared_examples: Annotated[int, Field(gt=1, le=10**9)] | None = None
    """A public number of training examples. `target_delta` and the sampling probability follow
    from it."""
    target_delta: Annotated[float, Field(ge=1e-10, lt=1)] | None = None
    """Default declared_examples^-1.1. Below 1e-10 the rounding errors of the accountants are of the
    same size, and the accountants no longer agree."""
    sampling_probability: Annotated[float, Field(gt=0, le=1)] | None = None
    """q: probability of each example to be in a step. Default expected_batch_size /
    declared_examples."""
    expected_batch_size: PositiveFloat | None = None
    """Divisor of the noisy sum of gradients; default tune.batch_size."""
    # The training. The defaults are those of `tune`.
    steps: PositiveInt | None = None
    """Steps of the private run; default tune.steps."""
    learning_rate: PositiveFloat | None = None
    """Learning rate of the private run; default tune.learning_rate."""
    max_grad_norm: PositiveFloat = 1.0
    """C: the Euclidean norm to which each example's gradient is clipped."""
    # The ledger of the data set.
    max_total_epsilon: PositiveFloat | None = None
    """Refuse a run that would take the total of all runs on this data set past this epsilon."""
    ledger: FilePath | None = None
    """File that records what the data set has spent. Default: beside a local data file, with
    `.ledger.jsonl` at the end of its name."""
    noise_source: Literal["system", "seeded"] = "system"
    """`seeded` repeats its noise, for tests: a run with it is NOT private."""

    def for_target(self, epsilon: float) -> "Privacy":
        """Return this plan, enabled, with the noise that meets an epsilon."""
        changes = {"enabled": True, "target_epsilon": epsilon, "noise_multiplier": None}
        return Privacy.model_validate(self.model_dump() | changes)

    @model_validator(mode="after")
    def _complete(self) -> "Privacy":
        # A plan that is not used may be incomplete.
        if not self.enabled:
            return self
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give either target_epsilon or noise_multiplier")
        lacks_either = self.target_delta is None or self.sampling_probability is None
        if self.declared_examples is None and lacks_either:
            raise ValueError(
                "give declared_examples, or both target_delta and sampling_probability"
            )
        return self
