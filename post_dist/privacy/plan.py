"""The plan of a private run.

Its sampler, clipping, noise and accounting all follow from it. Loads no torch.

The neighboring relation is to add or remove one example of the private data. Under this relation
the number of examples is private itself. So every number in the plan is declared in the run file,
and none is counted from the data.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dp_accounting import DpEvent, dp_event

from post_dist.config.schema import RunConfig
from post_dist.errors import InputError
from post_dist.privacy.sampling import PoissonSampler, Sampler

UNIT = "one example"
RELATION = "add or remove one"
LOGARITHMIC = 0.0
"""The logarithmic distribution's shape among the negative binomials of arXiv 2110.03620."""


@dataclass(frozen=True)
class PrivacyPlan:
    """DP-SGD, as one training run or as a search over several.

    Attributes:
        noise_multiplier: sigma. The noise has standard deviation sigma * max_grad_norm in each
            coordinate of the sum.
        sampling_probability: q, the probability that a step reads a given example.
        steps: number of steps T. All of them are taken; no step is chosen by its result.
        max_grad_norm: C, the Euclidean norm to which each example's gradient is clipped.
        delta: the delta at which epsilon is stated.
        expected_batch_size: divisor of the noisy sum. A constant, so that no realized batch size
            shows.
        noise_source: `system`, or `seeded` for tests, which is not private.
        declared_examples: the public number of examples, if the run file declares one.
        mean_trials: mean number of training runs in a search; None for a single run.
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
        """Whether the guarantee of the plan holds. It does not when the noise can be repeated."""
        return self.noise_source == "system"

    @property
    def sampler(self) -> Sampler:
        """The sampler that draws the examples of each step, and that the accounting is based on."""
        return PoissonSampler(self.sampling_probability)

    def trial_event(self) -> DpEvent:
        """Describe one training run, with its score in a search, for the accountants."""
        # The clipping norm is not part of it: sigma counts in units of C.
        training = self.sampler.event(self.noise_multiplier, self.steps)
        if self.score_noise_multiplier is None:
            return training
        score = dp_event.GaussianDpEvent(self.score_noise_multiplier)
        return dp_event.ComposedDpEvent([training, score])

    def event(self) -> DpEvent:
        """Describe all that is computed from the private data: one run, or the best of several."""
        if self.mean_trials is None:
            return self.trial_event()
        return dp_event.RepeatAndSelectDpEvent(self.trial_event(), self.mean_trials, LOGARITHMIC)

    def spent(self, begun: Mapping[int, int]) -> list["PrivacyPlan"]:
        """Return what a run has spent of this plan, as plans whose steps were all taken.

        A step that was started again for another sum reads the same examples as the first time. The
        k noisy sums of one sample tell as much as one sum with a k-th of the noise variance. That
        is more than k samples would tell.

        Args:
            begun: histogram from the number of times a step was started to the number of such
                steps. A search is charged in full whatever it took, and repeated steps are charged
                on top.
        """
        plans = []
        for times, count in sorted(begun.items()):
            in_full_price = self.mean_trials is not None and times <= 1
            if count == 0 or in_full_price:
                continue
            # Averaging k sums of one sample divides the noise variance by k.
            repeated = replace(
                self,
                mean_trials=None,
                score_noise_multiplier=None,
                steps=count,
                noise_multiplier=self.noise_multiplier / times**0.5,
            )
            plans.append(repeated)
        if self.mean_trials is None:
            return plans
        return [self, *plans]


def declared_plan(config: RunConfig, noise_multiplier: float) -> PrivacyPlan:
    """Return the plan that a run file declares, with a given noise multiplier.

    Raises:
        InputError: the section `privacy` lacks a number that the plan needs.
    """
    section = config.privacy
    # All defaults follow from declared numbers, never from the data.
    declared = section.declared_examples
    expected = section.expected_batch_size or float(config.tune.batch_size)
    delta = section.target_delta
    # Well below 1 / N, as is customary.
    if delta is None and declared:
        delta = declared**-1.1
    sampling_probability = section.sampling_probability
    # The probability for which the expected batch size is what the run file says.
    if sampling_probability is None and declared:
        sampling_probability = expected / declared
    if not delta or not sampling_probability:
        raise InputError(
            "privacy: give declared_examples, or both target_delta and sampling_probability"
        )
    search = config.tune.search
    return PrivacyPlan(
        noise_multiplier=noise_multiplier,
        sampling_probability=sampling_probability,
        steps=section.steps or config.tune.steps,
        max_grad_norm=section.max_grad_norm,
        delta=delta,
        expected_batch_size=expected,
        noise_source=section.noise_source,
        declared_examples=declared,
        mean_trials=None if search is None else search.mean_trials,
        score_noise_multiplier=None if search is None else search.score_noise_multiplier,
    )
