"""The run file's section for differential privacy: the plan of a private run."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from post_dist.config.sections import FilePath, PositiveFloat, PositiveInt, Section

LEAST_DELTA = 1e-12
"""Smallest delta that the accountants take. Further below, epsilon comes out as infinity."""


class Privacy(Section):
    """The plan of a private run. It is public: what `init` rounds from private data is released."""

    enabled: bool = False
    """Tune with differential privacy (DP-SGD)."""

    # The noise: give one of these.
    target_epsilon: PositiveFloat | None = None
    """Use the least noise that meets this epsilon. Give this field or `noise_multiplier`."""
    noise_multiplier: Annotated[float, Field(ge=0.2, le=1e4)] | None = None
    """sigma: standard deviation of the noise, divided by `max_grad_norm`. Below 0.2, epsilon is too
    large to be useful. Above 10,000, the noise leaves nothing of the gradients."""
    # The data set, by public numbers.
    declared_examples: Annotated[int, Field(gt=1, le=10**9)] | None = None
    """A public number of training examples. It sets the defaults of `target_delta` and
    `sampling_probability`."""
    target_delta: Annotated[float, Field(ge=1e-10, lt=1)] | None = None
    """delta at which epsilon is stated. Default: declared_examples^-1.1. Below 1e-10, rounding
    errors are as large as delta, and the accountants no longer agree."""
    sampling_probability: Annotated[float, Field(gt=0, le=1)] | None = None
    """q: probability that an example is in a step's batch. Default: expected_batch_size /
    declared_examples. With `declared_examples`, it is refused if the default is 10 times larger or
    smaller."""
    expected_batch_size: PositiveFloat | None = None
    """Divisor of the noisy sum of gradients. Default: `tune.batch_size`."""
    # The training. Most defaults are those of `tune`.
    steps: PositiveInt | None = None
    """Number of steps of the private run. Default: `tune.steps`."""
    learning_rate: PositiveFloat | None = None
    """Learning rate of the private run. Default: `tune.learning_rate`. For a head, the default is
    lower if the noise of the plan would otherwise move a class score by more than 0.4 nats."""
    max_grad_norm: PositiveFloat = 1.0
    """C: the Euclidean norm to which each example's gradient is clipped."""
    clip_quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Adapt C: after each step it moves toward this quantile of the gradient norms, and
    `max_grad_norm` is only its first value. The noise on the quantile is part of the plan (arXiv
    1905.03871). Default: C is fixed."""
    # The ledger of the data set.
    max_total_epsilon: PositiveFloat | None = None
    """Limit on the total epsilon of all runs on this data set. A run that would exceed it is
    refused. The first run writes the limit and its delta into the ledger, and `post-dist budget
    LEDGER --cap` changes it. Default: the limit of the ledger, or none."""
    ledger: FilePath | None = None
    """File that records what the data set has spent. Default: beside a local data file, with
    `.ledger.jsonl` added to its name."""
    ledger_anchors: FilePath | None = None
    """Folder that remembers where each ledger ends, so that removed rows are noticed. Default:
    `post_dist/ledgers` in `$XDG_STATE_HOME` or `~/.local/state`."""
    noise_source: Literal["system", "seeded"] = "system"
    """`system`: noise from the operating system's entropy. `seeded`: repeatable noise for tests. A
    seeded run is NOT private."""

    def for_target(self, epsilon: float) -> "Privacy":
        """Return this plan with privacy enabled and another target epsilon."""
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
