"""A private search over settings: run a random number of trials, and keep the best noisy score.

The number of trials is drawn from a logarithmic distribution, independent of the data. Each trial
is a whole private training run. Its score is the number of validation examples that it classifies
correctly, plus Gaussian noise. Only the best trial is published. Its cost is that of the
repeat-and-select event (Papernot and Steinke, arXiv 2110.03620), not the sum over trials.
"""

import math

import torch
from scipy.optimize import brentq

from post_dist.config.schema import Search
from post_dist.privacy.plan import PrivacyPlan
from post_dist.privacy.randomness import RandomSource
from post_dist.privacy.trainer import PrivateRun, PrivateTrainer, TrialSettings
from post_dist.runtime.checkpoint import load_tensors, newest_step, save_tensors


def run_search(trainer: PrivateTrainer, settings: TrialSettings) -> list[torch.Tensor]:
    """Run the trials and return the parameters of the best one, but not its settings.

    Args:
        trainer: trains and scores a trial.
        settings: defaults for settings that the search does not vary.

    Raises:
        ArtifactRefused: the key has been destroyed, and no trial was saved.
    """
    run = trainer.run
    kept = run.checkpoints / "search"
    finished = newest_step(kept)
    # A checkpoint holds the number of finished trials and the best one of them.
    best = {"score": torch.tensor(-math.inf, dtype=torch.float64)}
    if finished:
        best = load_tensors(kept, finished)
    for trial in range(finished, _trials_in_all(run.plan, run.source, finished)):
        # Settings, training and score noise are functions of the key and the trial's number.
        chosen = trial_settings(trainer.config.tune.search, settings, run.source, trial)
        parameters = trainer.train(chosen, trial, run.checkpoints / f"trial-{trial}")
        count = trainer.part.count_right(parameters)
        charge_score(run, count, trial)
        score = noisy_score(count, run.plan, run.source, trial)
        # The noisy score alone decides. Only the best trial's parameters are kept.
        if score > best["score"]:
            best = {"score": torch.tensor(score, dtype=torch.float64)}
            for index, value in enumerate(parameters):
                best[str(index)] = value
        save_tensors(kept, trial + 1, best)
    return [best[str(index)] for index in range(len(best) - 1)]


def charge_score(run: PrivateRun, count: int, trial: int) -> None:
    """Write to the ledger that a count will be released with noise.

    A run that is repeated on another machine may count another number of right examples.
    """
    commitment = run.source.commitment(str(count).encode(), "score", trial)
    run.ledger.intend_score(trial, commitment)


def noisy_score(count: int, plan: PrivacyPlan, source: RandomSource, trial: int) -> float:
    """Add the plan's noise to a number of correct validation examples, or to a gain in it.

    Args:
        count: the private count. The noise is a function of it, so another count gets independent
            noise.
        plan: gives the standard deviation of the noise.
        source: randomness of the run.
        trial: number of the trial; 0 without a search.
    """
    noise = float(source.normal(1, "score", trial, count)[0])
    return count + noise * float(plan.score_noise_multiplier or 0.0)


def number_of_trials(plan: PrivacyPlan, source: RandomSource) -> int:
    """Draw the number of trials from the logarithmic distribution with the plan's mean.

    P(k) = p^k / (-k log(1 - p)) for k = 1, 2, ...

    scipy.stats.logser.ppf gives the same numbers, but raises RuntimeError for some random words: 5
    of 10,000 at mean 10, and 65 at mean 100.
    """
    p = logarithmic_parameter(float(plan.mean_trials or 0.0))
    # Inversion: subtract P(1), P(2), ... from a uniform value until nothing remains.
    remaining = (int(source.words(1, "trials")[0]) + 0.5) / 2**64
    trials = 0
    weight = 1.0
    while remaining > 0:
        trials += 1
        weight *= p
        remaining -= weight / (-trials * math.log1p(-p))
    return trials


def logarithmic_parameter(mean: float) -> float:
    """Return the parameter p of the logarithmic distribution with the given mean.

    The mean is -p / ((1 - p) log(1 - p)).
    """

    def excess(p: float) -> float:
        return -p / ((1 - p) * math.log1p(-p)) - mean

    # The mean grows with p from 1 to infinity, so there is exactly one root.
    # pyrefly: ignore[bad-argument-type]
    return float(brentq(excess, 1e-12, 1 - 1e-12))


def trial_settings(
    search: Search | None, settings: TrialSettings, source: RandomSource, trial: int
) -> TrialSettings:
    """Draw the settings of a trial uniformly from the lists of a search.

    Args:
        search: the lists in the run file; None without a search.
        settings: defaults where a list is empty.
        source: randomness of the run.
        trial: number of the trial.
    """
    if search is None:
        return settings
    rates = search.learning_rate or (settings.learning_rate,)
    norms = search.max_grad_norm or (settings.max_grad_norm,)
    # One random word chooses a pair, so that all combinations are equally likely.
    word = int(source.words(1, "setting", trial)[0]) % (len(rates) * len(norms))
    return TrialSettings(rates[word % len(rates)], norms[word // len(rates)])


def _trials_in_all(plan: PrivacyPlan, source: RandomSource, finished: int) -> int:
    """Return the number of trials of the whole search.

    A search with saved trials and no key is complete. It was killed after the key was destroyed and
    before the artifact was written.
    """
    # Without the key the number of trials cannot be drawn again.
    if finished and not source.key:
        return finished
    return number_of_trials(plan, source)
