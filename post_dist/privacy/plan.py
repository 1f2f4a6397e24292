"""The plan of a private run.

The sampler, clipping, noise and accounting all follow from it. This module does not import torch.

Two data sets are neighbors if one has one more unit than the other: one more example, or one more
user with all their examples. Under this relation the number of units is itself private. So every
number in the plan is declared in the run file, and no run counts it from the data. Where `init`
has rounded it from the size of the table, it counts as released.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dp_accounting import DpEvent, dp_event

from post_dist.config.privacy import LEAST_DELTA
from post_dist.config.schema import RunConfig
from post_dist.errors import InputError
from post_dist.privacy.sampling import PoissonSampler, Sampler

ONE_EXAMPLE = "one example"
ONE_USER = "one user"
RELATION = "add or remove one"
LOGARITHMIC = 0.0
"""Shape 0 of the truncated negative binomial distribution (arXiv 2110.03620): logarithmic."""

_BOUNDS = {
    "noise_multiplier": (0.2, 1e4),
    "sampling_probability": (1e-12, 1),
    "steps": (1, 10**6),
    "max_grad_norm": (1e-6, 1e6),
    "delta": (LEAST_DELTA, 1),
    "expected_batch_size": (1e-6, 1e9),
    "declared_examples": (2, 10**9),
    "mean_trials": (1.001, 1e4),
    "score_noise_multiplier": (0.2, 1e4),
    "clip_quantile": (1e-3, 1 - 1e-3),
}
"""Numbers outside these bounds give no useful guarantee, overflow, or take hours to compute."""

_MOST_RATIO = 10
"""Largest ratio between the examples that a step draws and the divisor of their gradients."""

_MAY_BE_NONE = {"declared_examples", "mean_trials", "score_noise_multiplier", "clip_quantile"}
_INTEGERS = {"steps", "declared_examples"}


MOST_DELTA = 0.01
"""Largest delta of a plan."""


@dataclass(frozen=True)
class PrivacyPlan:
    """Parameters of DP-SGD, for one training run or for a search over several.

    Attributes:
        noise_multiplier: sigma. The noise has standard deviation sigma * max_grad_norm in each
            coordinate of the sum.
        sampling_probability: q, the probability that a step reads a given example.
        steps: number of steps T. All steps are taken, and the last one gives the result.
        max_grad_norm: C, the Euclidean norm to which each example's gradient is clipped.
        delta: the delta at which epsilon is stated.
        expected_batch_size: divisor of the noisy sum. It is a constant, because the realized batch
            size is private.
        noise_source: `system`, or `seeded` for tests, which is not private.
        declared_examples: the public number of examples, if the run file declares one.
        mean_trials: mean number of training runs in a search; None for a single run.
        score_noise_multiplier: standard deviation of the noise on a trial's score, or on the
            comparison of a single run with its start; None for a single run without one.
        unit: what neighbors differ in: one example, or all examples of one user.
        clip_quantile: the quantile of gradient norms that C follows; None for a fixed C.
    """

    noise_multiplier: float
    sampling_probability: float
    steps: int
    max_grad_norm: float
    delta: float
    expected_batch_size: float
    noise_source: str = "system"
    declared_examples: int | None = None
    mean_trials: float | None = None
    score_noise_multiplier: float | None = None
    unit: str = ONE_EXAMPLE
    clip_quantile: float | None = None

    @property
    def private(self) -> bool:
        """Whether the guarantee of the plan holds. It does not if the noise can be repeated."""
        return self.noise_source == "system"

    @property
    def count_deviation(self) -> float:
        """Standard deviation of the noise on the number of unclipped gradients of a step.

        A twentieth of the expected batch size, as Andrew et al. choose it (arXiv 1905.03871).
        """
        return self.expected_batch_size / 20

    @property
    def gradient_noise_multiplier(self) -> float:
        """Noise multiplier of the sum of gradients.

        With `clip_quantile`, a step also publishes how many gradients were not clipped. One unit
        moves that number, minus half the batch, by 1/2. Sum and number together cost as much as one
        sum with `noise_multiplier` (theorem 1 of arXiv 1905.03871).
        """
        if self.clip_quantile is None:
            return self.noise_multiplier
        remaining: float = self.noise_multiplier**-2 - (2 * self.count_deviation) ** -2
        return float(remaining**-0.5)

    @property
    def sampler(self) -> Sampler:
        """The sampler that draws the examples of each step and defines the accounting."""
        return PoissonSampler(self.sampling_probability)

    def out_of_bounds(self) -> list[str]:
        """Return what the accountants cannot take, as the name and the allowed range of each field.

        A plan may come from a file that others can change, so values may have any type.
        """
        problems = []
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            # True and False do not count as numbers.
            kinds = (int,) if name in _INTEGERS else (int, float)
            if type(value) not in kinds or not least <= value <= most:
                problems.append(f"{name} must be from {least:g} to {most:g}")
        if self.noise_source not in ("system", "seeded"):
            problems.append("noise_source must be system or seeded")
        # The noise on the number of unclipped gradients alone must cost less than the whole plan.
        adapts = self.clip_quantile is not None and not problems
        if adapts and 2 * self.count_deviation <= self.noise_multiplier:
            problems.append("clip_quantile needs an expected batch of 10 times noise_multiplier")
        if self.unit not in (ONE_EXAMPLE, ONE_USER):
            problems.append(f"unit must be {ONE_EXAMPLE} or {ONE_USER}")
        # A search scores its trials. A single run may compare its result with its start.
        if self.mean_trials is not None and self.score_noise_multiplier is None:
            problems.append("mean_trials needs score_noise_multiplier")
        return problems

    @property
    def misfit(self) -> str | None:
        """Say why the numbers of the plan do not belong together; None if they do.

        Each of them may be in its bounds. With a q that is far too small, epsilon is small, and
        the steps learn from nothing.
        """
        if self.declared_examples is None:
            return None
        drawn = self.sampling_probability * self.declared_examples
        if 1 / _MOST_RATIO <= drawn / self.expected_batch_size <= _MOST_RATIO:
            return None
        return (
            f"a step draws {drawn:.3g} of {self.declared_examples} examples, and the sum of their "
            f"gradients is divided by {self.expected_batch_size:g}"
        )

    def trial_event(self) -> DpEvent:
        """Describe one training run, with its score or comparison, for the accountants."""
        # The clipping norm C is not part of the event, because sigma is in units of C.
        training = self.sampler.event(self.noise_multiplier, self.steps)
        if self.score_noise_multiplier is None:
            return training
        score = dp_event.GaussianDpEvent(self.score_noise_multiplier)
        return dp_event.ComposedDpEvent([training, score])

    def event(self) -> DpEvent:
        """Describe everything computed from the private data: one run, or the best of several."""
        if self.mean_trials is None:
            return self.trial_event()
        return dp_event.RepeatAndSelectDpEvent(self.trial_event(), self.mean_trials, LOGARITHMIC)

    def warnings(self) -> list[str]:
        """Return what weakens the guarantee although the plan may run."""
        examples = self.declared_examples
        # With a delta of 1 / N, publishing one example at random would keep the promise.
        if examples is None or self.delta < 1 / examples:
            return []
        return [
            f"delta {self.delta:.2g} is not below 1 / {examples}: the guarantee allows that an "
            "example is revealed in full"
        ]

    def spent(
        self, begun: Mapping[int, int], released: Mapping[int, int] | None = None
    ) -> list["PrivacyPlan"]:
        """Return what a run has spent of this plan, as plans whose steps were all taken.

        A step that is started again with another sum reads the same examples as the first time. Its
        k noisy sums reveal as much as one sum with 1/k of the noise variance. That is more than k
        independent samples would reveal. A search is always charged in full, and its repeated steps
        are charged on top. A comparison with the start is charged with the first step. The same
        holds for it and for the scores of a search: k noisy counts of one trial reveal as much as
        one with 1/k of the noise variance.

        Args:
            begun: histogram: number of times a step was started -> number of such steps.
            released: histogram: number of different noisy counts of a trial that were released ->
                number of such trials. None if each was released once at most.
        """
        score_noise = self._charged_score_noise(released or {})
        plans: list[PrivacyPlan] = []
        for times, count in sorted(begun.items()):
            covered_by_search = self.mean_trials is not None and times <= 1
            if count == 0 or covered_by_search:
                continue
            compared = None if plans else score_noise
            # Averaging k sums of one sample divides the noise variance by k.
            repeated = replace(
                self,
                mean_trials=None,
                score_noise_multiplier=compared,
                steps=count,
                noise_multiplier=self.noise_multiplier / times**0.5,
            )
            plans.append(repeated)
        if self.mean_trials is None:
            return plans
        # Scores may differ where no step does. A plan has a step at least, which comes with them.
        if score_noise is not None and not plans:
            alone = replace(self, mean_trials=None, score_noise_multiplier=score_noise, steps=1)
            plans.append(alone)
        return [self, *plans]

    def _charged_score_noise(self, released: Mapping[int, int]) -> float | None:
        """Return the noise of one count that reveals as much as all that are charged; or None.

        The scores of a search are in its own charge. Those of repeated trials come on top.
        """
        of_one = self.score_noise_multiplier
        counts = max(released, default=1)
        if self.mean_trials is not None:
            counts = sum(times * trials for times, trials in released.items() if times > 1)
        return None if of_one is None or not counts else of_one / counts**0.5


def declared_plan(config: RunConfig, noise_multiplier: float) -> PrivacyPlan:
    """Return the plan that a run file declares, with a given noise multiplier.

    Raises:
        InputError: the section `privacy` lacks a number that the plan needs, or no accountant can
            take a number.
    """
    section = config.privacy
    # All defaults follow from declared numbers, never from the data.
    declared = section.declared_examples
    expected = section.expected_batch_size or float(config.tune.batch_size)
    delta = section.target_delta
    # The usual choice: well below 1 / N.
    if delta is None and declared:
        delta = declared**-1.1
    sampling_probability = section.sampling_probability
    # With this probability, the mean number of sampled examples is the expected batch size.
    if sampling_probability is None and declared:
        sampling_probability = expected / declared
    if not delta or not sampling_probability:
        raise InputError(
            "privacy: give declared_examples, or both target_delta and sampling_probability"
        )
    search = config.tune.search
    score_noise = config.tune.comparison_noise_multiplier
    if search is not None:
        score_noise = search.score_noise_multiplier
    plan = PrivacyPlan(
        noise_multiplier=noise_multiplier,
        sampling_probability=sampling_probability,
        steps=section.steps or config.tune.steps,
        max_grad_norm=section.max_grad_norm,
        delta=delta,
        expected_batch_size=expected,
        noise_source=section.noise_source,
        declared_examples=declared,
        mean_trials=None if search is None else search.mean_trials,
        score_noise_multiplier=score_noise,
        unit=ONE_USER if config.protects_users else ONE_EXAMPLE,
        clip_quantile=section.clip_quantile,
    )
    problems = plan.out_of_bounds()
    if problems:
        raise InputError(
            f"privacy: {'; '.join(problems)}",
            "set these fields of the section privacy; docs/privacy.md explains them",
        )
    # The prompts of such plans would not pass the door.
    if plan.delta > MOST_DELTA:
        raise InputError(
            f"privacy: a delta of {plan.delta:.3g} is above {MOST_DELTA:g}, which protects nobody",
            "set privacy.target_delta, well below one over the number of examples",
        )
    if plan.misfit is not None:
        raise InputError(
            f"privacy: {plan.misfit}",
            "set expected_batch_size to sampling_probability times declared_examples",
        )
    return plan
