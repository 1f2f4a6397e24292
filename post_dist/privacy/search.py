"""A search over settings whose price is known: a random number of trials, and the best one by a noisy score.

How many trials are run is drawn from a logarithmic distribution that does not look at the data; each trial is a whole private
run whose score, the number of validation rows that it gets right, has Gaussian noise on it. Only the best trial leaves. The
price is that of the repeat-and-select event (Papernot and Steinke, arXiv 2110.03620), not the sum over the trials.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from scipy.optimize import brentq

from post_dist.config.schema import Tune
from post_dist.privacy.plan import PrivacyPlan
from post_dist.privacy.randomness import RandomSource
from post_dist.privacy.training import PrivateRun
from post_dist.runtime.checkpoint import load_tensors, newest_step, save_tensors


@dataclass(frozen=True)
class Setting:
    """One candidate: what a trial trains with. None of it changes what the trial costs."""

    learning_rate: float
    max_grad_norm: float

    def applied_to(self, run: PrivateRun) -> PrivateRun:
        """The run with the candidate's clipping norm."""
        return replace(run, plan=replace(run.plan, max_grad_norm=self.max_grad_norm))


Train = Callable[[Setting, int, Path], list[torch.Tensor]]
"""From a setting, the number of the trial and the folder of its checkpoints to the tuned parameters."""


def run_search(
    section: Tune,
    learning_rate: float,
    plan: PrivacyPlan,
    source: RandomSource,
    checkpoints: Path,
    train: Train,
    right: Callable[[list[torch.Tensor]], int],
) -> list[torch.Tensor]:
    """Run the trials and give the parameters of the best.

    Args:
        section: its `search` names the candidates.
        learning_rate: of every trial, where the search names none.
        plan: gives the mean number of trials and the noise on a score.
        source: decides how many trials, which settings, and the noise.
        checkpoints: where trials are kept until the search is done.
        train: runs one trial.
        right: counts the validation rows that parameters get right.

    Returns:
        The best trial's parameters; which one it was is not said.

    Raises:
        ArtifactRefused: the key has been destroyed, and no trial is kept.
    """
    kept = checkpoints / "search"
    finished = newest_step(kept)
    best = (
        load_tensors(kept, finished)
        if finished
        else {"score": torch.tensor(-math.inf, dtype=torch.float64)}
    )
    # Without its key a search that kept a trial is over: it was killed between the key's end and its artifact.
    for trial in range(
        finished, finished if finished and not source.key else number_of_trials(plan, source)
    ):
        parameters = train(
            setting_of(section, learning_rate, plan, source, trial),
            trial,
            checkpoints / f"trial-{trial}",
        )
        count = right(parameters)
        score = count + float(source.normal(1, "score", trial, count)[0]) * float(
            plan.score_noise_multiplier or 0.0
        )
        if score > best["score"]:
            best = {
                "score": torch.tensor(score, dtype=torch.float64),
                **{str(index): value for index, value in enumerate(parameters)},
            }
        save_tensors(kept, trial + 1, best)
    return [best[str(index)] for index in range(len(best) - 1)]


def number_of_trials(plan: PrivacyPlan, source: RandomSource) -> int:
    """A draw from the logarithmic distribution with the plan's mean: P(k) = p^k / (-k log(1 - p)), k = 1, 2, ..."""
    p = logarithmic_parameter(float(plan.mean_trials or 0.0))
    left = (int(source.words(1, "trials")[0]) + 0.5) / 2**64
    trials, weight = 0, 1.0
    while left > 0:
        trials += 1
        weight *= p
        left -= weight / (-trials * math.log1p(-p))
    return trials


def logarithmic_parameter(mean: float) -> float:
    """The p of the logarithmic distribution whose mean, -p / ((1 - p) log(1 - p)), is given (above 1)."""
    return float(brentq(lambda p: -p / ((1 - p) * math.log1p(-p)) - mean, 1e-12, 1 - 1e-12))


def setting_of(
    section: Tune, learning_rate: float, plan: PrivacyPlan, source: RandomSource, trial: int
) -> Setting:
    """The candidate that a trial tries, drawn evenly from the lists; what they leave open stays as given."""
    search = section.search
    rates = (search.learning_rate if search else ()) or (learning_rate,)
    norms = (search.max_grad_norm if search else ()) or (plan.max_grad_norm,)
    word = int(source.words(1, "setting", trial)[0]) % (len(rates) * len(norms))
    return Setting(rates[word % len(rates)], norms[word // len(rates)])
