"""Check a plan's epsilon empirically: send canaries through the real training step.

The adversary chooses everything but the canaries' membership and sees every noisy gradient. In this
white-box setting the analysis of DP-SGD is tight (Nasr et al., arXiv 2302.07956). Each canary has a
coordinate of its own, along which its gradient has the clipping norm. A coin decides whether the
canary is in the data set. The adversary also chooses the other data, and chooses none. So an audit
reads no private example and spends no privacy budget.

The best membership test gives a lower bound on epsilon at 95% confidence (Clopper and Pearson;
Jagielski et al. 2020). The bound assumes that the canaries of one run are independent. They are if
the noise is independent across coordinates, which the test suite checks.

Shapes: M canaries, B of them in a step.
"""

import math
import secrets
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.stats import beta

from post_dist.config.schema import RunConfig
from post_dist.errors import InputError
from post_dist.privacy.accounting import account
from post_dist.privacy.calibration import private_plan
from post_dist.privacy.mechanism import PrivateOptimizer
from post_dist.privacy.plan import PrivacyPlan
from post_dist.privacy.randomness import RandomSource

# Probability that the lower bound exceeds the true epsilon. Each error rate gets half of it.
_ERROR = 0.05

# Canaries in one run. The run trains one parameter with one coordinate for each canary.
_CANARIES = 2048
_LEAST_RUNS = 16

# There are enough canaries to measure an epsilon this far above the claim. Otherwise the audit
# could not detect a broken mechanism.
_SPARE = 1.0
_MOST_CLAIM = 11.0

# If a test of N canaries makes no error, the 97.5% upper bound of its error rate is 3.7 / N.
_POISSON_BOUND = 3.7


class _NoNoise(RandomSource):
    """Random source of the control run: all noise is zero."""

    def normal(self, count: int, *purpose: object) -> np.ndarray:
        return np.zeros(count)


def audit(config: RunConfig) -> dict[str, Any]:
    """Audit the plan of a run file, once with noise and once without.

    The bound without noise is the control. If it does not exceed the claim, the audit cannot detect
    a broken mechanism.

    Raises:
        InputError: the claimed epsilon is too large to test with a reasonable number of canaries.
    """
    # An audit covers one training run. It does not cover the selection by a search.
    plan = private_plan(config)
    claim = account(replace(plan, mean_trials=None, score_noise_multiplier=None)).epsilon
    if claim > _MOST_CLAIM:
        raise InputError(
            f"an audit needs too many canaries to tell epsilon {claim:.1f} from no privacy",
            f"audit a plan with an epsilon up to {_MOST_CLAIM:g}",
        )
    # One factor 2: half of the canaries are members. The other: half of the scores choose the
    # threshold.
    needed = 2 * 2 * _POISSON_BOUND * math.exp(claim + _SPARE)
    runs = max(_LEAST_RUNS, math.ceil(needed / _CANARIES) + 1)
    sources = [RandomSource(f"audit {number}", secrets.token_bytes(32)) for number in range(runs)]
    quiet_sources: list[RandomSource] = [_NoNoise(source.run, source.key) for source in sources]
    return {
        "epsilon_claimed": claim,
        "epsilon_lower_bound": _bound_of_runs(plan, sources),
        "epsilon_lower_bound_without_noise": _bound_of_runs(plan, quiet_sources),
        "delta": plan.delta,
        "confidence": 1 - _ERROR,
        "canaries": runs * _CANARIES,
        "runs": runs,
        "steps_per_run": plan.steps,
    }


def canary_scores(
    plan: PrivacyPlan, source: RandomSource, canaries: int = _CANARIES
) -> tuple[np.ndarray, np.ndarray]:
    """Run the private training step for all steps of a plan, with canaries as the only data.

    Returns:
        The scores of the members, and the scores of the canaries left out. A score is the log
        likelihood ratio of the noisy gradients.
    """
    # A coin for each canary decides whether it is in the data set.
    member_M = source.words(canaries, "coins") % 2 == 0
    members = np.flatnonzero(member_M)
    # One coordinate for each canary, so that a canary's noisy gradient can be read alone.
    parameter = torch.zeros(canaries, requires_grad=True)
    optimizer = PrivateOptimizer(torch.optim.SGD([parameter], lr=1.0), plan, source)
    score_M = np.zeros(canaries)
    for step in range(plan.steps):
        drawn = members[plan.sampler.draw(source, len(members), 0, step)]
        # The gradient of each sampled canary has the full clipping norm in its coordinate.
        gradients = torch.zeros(len(drawn), canaries)
        gradients[torch.arange(len(drawn)), torch.from_numpy(drawn)] = plan.max_grad_norm
        before = parameter.detach().clone()
        optimizer.accumulate([gradients])
        optimizer.finish(step, lambda commitment: None)
        # SGD with learning rate 1 moves the parameter by the noisy mean. That gives the sum.
        moved_M = before - parameter.detach()
        sum_M = moved_M * (plan.expected_batch_size / plan.max_grad_norm)
        score_M += _log_likelihood_ratios(plan, sum_M.double().numpy())
    return score_M[member_M], score_M[~member_M]


def lower_bound(members: np.ndarray, others: np.ndarray, delta: float) -> float:
    """Return the largest lower bound on epsilon that the scores support, at 95% confidence.

    Half of the scores choose the threshold. The other half give the bound.

    Args:
        members: scores of the canaries in the data set.
        others: scores of the canaries left out.
        delta: the delta of the claimed epsilon.
    """
    # Choosing the threshold on the scores that give the bound would inflate the bound.
    tried = _thresholds(members[::2], others[::2])
    bounds = [_bound(members[::2], others[::2], threshold, delta) for threshold in tried]
    best = tried[int(np.argmax(bounds))]
    return max(0.0, _bound(members[1::2], others[1::2], best, delta))


def _bound_of_runs(plan: PrivacyPlan, sources: list[RandomSource]) -> float:
    """Return the lower bound on epsilon from the canaries of all runs."""
    members = []
    others = []
    for source in sources:
        inside, outside = canary_scores(plan, source)
        members.append(inside)
        others.append(outside)
    return lower_bound(np.concatenate(members), np.concatenate(others), plan.delta)


def _log_likelihood_ratios(plan: PrivacyPlan, sum_M: np.ndarray) -> np.ndarray:
    """Return log(p(sum | member) / p(sum | not a member)) for the coordinate of each canary.

    Args:
        plan: gives sigma and the sampler.
        sum_M: one noisy sum, in units of the clipping norm C.
    """
    ratio_M: np.ndarray = (2 * sum_M - 1) / (2 * plan.noise_multiplier**2)
    q = plan.sampler.inclusion_probability
    if q == 1:
        return ratio_M
    # A member is sampled with probability q, so its density is a mixture of both densities.
    mixture_M: np.ndarray = np.logaddexp(np.log1p(-q), np.log(q) + ratio_M)
    return mixture_M


def _thresholds(members: np.ndarray, others: np.ndarray) -> list[float]:
    """Return the thresholds to try: midpoints of about 400 quantiles and of the extreme scores."""
    # The extremes matter most, because thresholds with few errors give the best bounds.
    everything = np.sort(np.concatenate([members, others]))
    quantiles = everything[:: max(1, len(everything) // 400)]
    ends = np.unique(np.concatenate([quantiles, everything[:50], everything[-50:]]))
    middles = (ends[1:] + ends[:-1]) / 2
    outside = [ends[0] - 1, ends[-1] + 1]
    return [float(threshold) for threshold in np.append(middles, outside)]


def _bound(members: np.ndarray, others: np.ndarray, threshold: float, delta: float) -> float:
    """Return the lower bound on epsilon that the error rates of a threshold give."""
    # Upper confidence bounds of the rates make the result hold at the stated confidence.
    false_positives = int((others > threshold).sum())
    false_negatives = int((members <= threshold).sum())
    positive_rate = _upper_end(false_positives, len(others))
    negative_rate = _upper_end(false_negatives, len(members))
    # Differential privacy bounds each error rate by the other. The larger bound counts.
    by_positives = _log_ratio(1 - delta - negative_rate, positive_rate)
    by_negatives = _log_ratio(1 - delta - positive_rate, negative_rate)
    return max(by_positives, by_negatives)


def _log_ratio(right: float, wrong: float) -> float:
    """Return log(right / wrong), or 0 if `right` is not positive, where there is no bound."""
    if right <= 0:
        return 0.0
    return math.log(right / wrong)


def _upper_end(count: int, total: int) -> float:
    """Return the Clopper-Pearson upper bound of a rate, at half of `_ERROR`."""
    if count == total:
        return 1.0
    # binomtest(...).proportion_ci also computes a p-value, which makes it 27 times as slow.
    return float(beta.ppf(1 - _ERROR / 2, count + 1, total - count))
