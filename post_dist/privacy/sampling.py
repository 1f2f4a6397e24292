"""Samplers: which examples a step reads, and what that means for the accountants.

A sampler is one object, so that the examples that a step draws and the event that is accounted
cannot drift apart. To add a sampler, write a class with the interface of `Sampler` here, add its
field to `config/privacy.py`, and choose it in `PrivacyPlan.sampler`.
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
        """Its name in `privacy.json`."""

    @property
    def inclusion_probability(self) -> float:
        """Probability that a step reads a given example."""

    def draw(self, source: RandomSource, total: int, *step: object) -> list[int]:
        """Draw the examples of a step.

        Args:
            source: all randomness of the run.
            total: number of private examples. It is private itself, and no published number depends
                on it.
            *step: names the step; the same name draws the same examples.

        Returns:
            Numbers of the examples in rising order; the list may be empty.
        """

    def event(self, noise_multiplier: float, steps: int) -> DpEvent:
        """Describe `steps` steps with Gaussian noise for the accountants of dp-accounting."""

    def opacus_history(self, noise_multiplier: float, steps: int) -> list[tuple[float, float, int]]:
        """Describe the same steps for the accountants of Opacus, as (sigma, q, steps)."""


@dataclass(frozen=True)
class PoissonSampler:
    """Poisson sampling: each example is in a step with probability q, independently of all others.

    Attributes:
        sampling_probability: q, above 0 and at most 1.
    """

    sampling_probability: float

    @property
    def name(self) -> str:
        """Its name in `privacy.json`."""
        return "Poisson"

    @property
    def inclusion_probability(self) -> float:
        """Probability that a step reads a given example."""
        return self.sampling_probability

    def draw(self, source: RandomSource, total: int, *step: object) -> list[int]:
        """Draw the examples of a step; see `Sampler.draw`."""
        # The purpose "rows" is part of the random stream: another name would draw other examples.
        words_N = source.words(total, "rows", *step)
        # A uniform word is below the threshold with probability q, to a multiple of 2^-64.
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
