"""The plan of a private run, from which its sampler, clip, noise and accounting all come. Loads no torch.

The neighbouring relation is to add or remove one example (one row of the private data). The relation makes the number of
rows itself private, so every figure here is declared in the run file and none is counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import dp_accounting
from dp_accounting import dp_event

from post_dist.config.schema import RunConfig
from post_dist.errors import InputError

UNIT = "one example"
RELATION = "add or remove one"
LOGARITHMIC = 0.0
"""Shape of the number of trials among the negative binomials of arXiv 2110.03620."""


@dataclass(frozen=True)
class PrivacyPlan:
    """DP-SGD with Poisson sampling, once or in a search.

    Attributes:
        noise_multiplier: sigma; the noise has standard deviation sigma * max_grad_norm in each coordinate of the sum.
        sampling_probability: q, the chance of each example to be in a step, each by itself.
        steps: T, all of which are run: no step is chosen.
        max_grad_norm: C, to which each example's gradient is clipped.
        delta: at which epsilon is stated.
        expected_batch_size: what the noisy sum is divided by; a constant, so that no realised batch size shows.
        noise_source: `system`, or `seeded` for tests, which is not private.
        declared_examples: the public figure for the number of examples, if one was declared.
        mean_trials: mean number of runs in a search; None for one run.
        score_noise_multiplier: standard deviation of the noise on a trial's score.
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

    @property
    def private(self) -> bool:
        """Whether the plan's guarantee holds: not with noise that can be repeated."""
        return self.noise_source == "system"

    def trial_event(self) -> dp_accounting.DpEvent:
        """One training run, and its score in a search."""
        step = dp_event.PoissonSampledDpEvent(
            self.sampling_probability, dp_event.GaussianDpEvent(self.noise_multiplier)
        )
        run = dp_event.SelfComposedDpEvent(step, self.steps)
        if self.score_noise_multiplier is None:
            return run
        return dp_event.ComposedDpEvent(
            [run, dp_event.GaussianDpEvent(self.score_noise_multiplier)]
        )

    def event(self) -> dp_accounting.DpEvent:
        """All that the private data are asked: one run, or the best of a random number of runs."""
        if self.mean_trials is None:
            return self.trial_event()
        return dp_event.RepeatAndSelectDpEvent(self.trial_event(), self.mean_trials, LOGARITHMIC)

    def spent(self, begun: Mapping[int, int]) -> list["PrivacyPlan"]:
        """What was taken of the plan, as plans whose steps were all taken.

        A step that was begun again for another sum has the rows of the first time: k noisy sums of one sample tell as much as one with
        a k-th of the noise's variance, which is more than k samples would.

        Args:
            begun: from how often a step was begun to how many such steps there are. A search counts whole whatever it took, and what was
                begun more than once beside it.
        """
        steps = [
            replace(
                self,
                mean_trials=None,
                score_noise_multiplier=None,
                steps=count,
                noise_multiplier=self.noise_multiplier / times**0.5,
            )
            for times, count in sorted(begun.items())
            if count and (self.mean_trials is None or times > 1)
        ]
        return steps if self.mean_trials is None else [self, *steps]


def plan_fields(config: RunConfig) -> dict[str, Any]:
    """The plan's figures as a run file declares them, all but the noise multiplier.

    Raises:
        InputError: the section `privacy` does not say enough.
    """
    section, tune = config.privacy, config.tune
    declared, expected = (
        section.declared_examples,
        section.expected_batch_size or float(tune.batch_size),
    )
    delta = (
        section.target_delta if section.target_delta is not None else declared and declared**-1.1
    )
    sampling_probability = section.sampling_probability
    if sampling_probability is None and declared:
        sampling_probability = expected / declared
    if not delta or not sampling_probability:
        raise InputError(
            "privacy: give declared_examples, or both target_delta and sampling_probability"
        )
    search = tune.search
    return {
        "sampling_probability": sampling_probability,
        "steps": section.steps or tune.steps,
        "max_grad_norm": section.max_grad_norm,
        "delta": delta,
        "expected_batch_size": expected,
        "noise_source": section.noise_source,
        "declared_examples": declared,
        "mean_trials": search.mean_trials if search else None,
        "score_noise_multiplier": search.score_noise_multiplier if search else None,
    }
