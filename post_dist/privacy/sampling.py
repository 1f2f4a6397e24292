"""Samplers: they draw the examples of each step, and describe the steps to the accountants.

One object does both, so that drawing and accounting always match. To add a sampler:

1. Write a class with the interface of `Sampler` here.
2. Add its field to the section `privacy` in `config/privacy.py`.
3. Choose it in `PrivacyPlan.sampler`.
"""

from dataclasses import dataclass
from typing import Protocol

from dp_accounting import DpEvent, dp_event

from post_dist.privacy.randomness import RandomSource

_WORDS = 2**64


class Sampler(Protocol):
    """Chooses the examples of every step of a training run."""

    @property
    def name(self) -> str:
        """Name of the sampler in `privacy.json`."""

    @property
    def inclusion_probability(self) -> float:
        """Probability that a step reads a given example."""

    def draw(self, source: RandomSource, total: int, *step: object) -> list[int]:
        """Draw the examples of a step.

        Args:
            source: all randomness of the run.
            total: number of private examples. It is itself private, and no published number
                depends on it.
            *step: name of the step. The same name draws the same examples.

        Returns:
            Indices of the examples in ascending order; the list may be empty.
        """

    def event(self, noise_multiplier: float, steps: int) -> DpEvent:
        """Describe `steps` steps with Gaussian noise for the accountants of dp-accounting."""

    def opacus_history(self, noise_multiplier: float, steps: int) -> list[tuple[float, float, int]]:
        """Describe the same steps for the accountants of Opacus, as (sigma, q, steps)."""


@dataclass(frozen=True)
class PoissonSampler:
    """Poisson sampling: each example is in a step with probability q, independent of all others.

    Attributes:
        sampling_probability: q, above 0 and at most 1.
    """

    sampling_probability: float

    @property
    def name(self) -> str:
        """Name of the sampler in `privacy.json`."""
        return "Poisson"

    @property
    def inclusion_probability(self) -> float:
        """Probability that a step reads a given example."""
        return self.sampling_probability

    def draw(self, source: RandomSource, total: int, *step: object) -> list[int]:
        """Draw the examples of a step; see `Sampler.draw`."""
        # The purpose "rows" must not change: another purpose would draw other examples.
        words_N = source.words(total, "rows", *step)
        # A uniform word is below the threshold with probability q, rounded to 2^-64.
        threshold = int(self.sampling_probability * _WORDS)
        return [example for example, word in enumerate(words_N.tolist()) if word < threshold]

    def event(self, noise_multiplier: float, steps: int) -> DpEvent:
        """Describe `steps` steps with Gaussian noise for the accountants of dp-accounting."""
        # dp-accounting composes the subsampled Gaussian mechanism with itself.
        noise = dp_event.GaussianDpEvent(noise_multiplier)
        step = dp_event.PoissonSampledDpEvent(self.sampling_probability, noise)
        return dp_event.SelfComposedDpEvent(step, steps)

    def opacus_history(self, noise_multiplier: float, steps: int) -> list[tuple[float, float, int]]:
        """Describe the same steps for the accountants of Opacus, as (sigma, q, steps)."""
        return [(noise_multiplier, self.sampling_probability, steps)]
