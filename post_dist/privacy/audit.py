"""An empirical check of the claim: canaries go through the real sampler, clip, sum, noise and step, and are looked for after it.

The adversary chooses everything but the canaries' membership and sees every noisy gradient: the white-box setting in which
DP-SGD's analysis is tight (Nasr et al., arXiv 2302.07956). Each canary's gradient lies along a coordinate of its own and has the
clipping norm, and by a coin it is among the data or not. The other data are empty, which is the adversary's choice too, so
auditing reads no private row and spends nothing. From how well the best test tells members from the others follows a lower
bound on epsilon at 95% confidence (Clopper and Pearson; Jagielski et al. 2020). It takes canaries of one run for independent,
which they are when the noise of two coordinates is; a test of the noise holds that.

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
from post_dist.privacy.accounting import account, private_plan
from post_dist.privacy.mechanism import PrivateOptimizer
from post_dist.privacy.plan import PrivacyPlan
from post_dist.privacy.randomness import RandomSource
from post_dist.privacy.sampling import poisson_rows

_ERROR = 0.05
_CANARIES = 2048
"""In one run; as many coordinates as they need, each in a prompt of that many values."""
_LEAST_RUNS = 16
_SPARE = 1.0
"""The canaries suffice to show this much more than the claim, so that a broken mechanism is seen to be one."""
_MOST_CLAIM = 11.0


class _NoNoise(RandomSource):
    """The source of the control: its noise is switched off."""

    def normal(self, count: int, *purpose: object) -> np.ndarray:
        return np.zeros(count)


def audit(config: RunConfig) -> dict[str, Any]:
    """Audit the plan of a run file, and again with the noise off: the control must exceed the claim, or the audit is blind.

    Raises:
        InputError: the claim is above what so many canaries can show.
    """
    plan = private_plan(config)
    claim = account(replace(plan, mean_trials=None, score_noise_multiplier=None)).epsilon
    if claim > _MOST_CLAIM:
        raise InputError(
            f"an audit needs too many canaries to tell epsilon {claim:.1f} from no privacy",
            f"it can up to {_MOST_CLAIM:g}",
        )
    runs = max(_LEAST_RUNS, math.ceil(2 * 2 * 3.7 * math.exp(claim + _SPARE) / _CANARIES) + 1)
    sources = [RandomSource(f"audit {number}", secrets.token_bytes(32)) for number in range(runs)]
    bound = lower_bound(*_scores(plan, sources), plan.delta)
    control = lower_bound(
        *_scores(plan, [_NoNoise(source.run, source.key) for source in sources]), plan.delta
    )
    return {
        "epsilon_claimed": claim,
        "epsilon_lower_bound": bound,
        "epsilon_lower_bound_without_noise": control,
        "delta": plan.delta,
        "confidence": 1 - _ERROR,
        "canaries": runs * _CANARIES,
        "runs": runs,
        "steps_per_run": plan.steps,
    }


def _scores(plan: PrivacyPlan, sources: list[RandomSource]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the members and of the others, over all runs."""
    pairs = [canary_scores(plan, source) for source in sources]
    members, others = zip(*pairs, strict=True)
    return np.concatenate(members), np.concatenate(others)


def canary_scores(
    plan: PrivacyPlan, source: RandomSource, canaries: int = _CANARIES
) -> tuple[np.ndarray, np.ndarray]:
    """One run of the training step for all of the plan's steps, with canaries alone.

    Returns:
        For each member, and for each canary left out, the logarithm of the likelihood ratio of the noisy gradients seen.
    """
    member_M = source.words(canaries, "coins") % 2 == 0
    inside = np.flatnonzero(member_M)
    parameter = torch.zeros(canaries, requires_grad=True)
    optimizer = PrivateOptimizer(torch.optim.SGD([parameter], lr=1.0), plan, source)
    score_M = np.zeros(canaries)
    variance, q = plan.noise_multiplier**2, plan.sampling_probability
    for step in range(plan.steps):
        rows = inside[poisson_rows(plan, source, len(inside), 0, step)]
        gradients = torch.zeros(len(rows), canaries)
        gradients[torch.arange(len(rows)), torch.from_numpy(rows)] = plan.max_grad_norm
        before = parameter.detach().clone()
        optimizer.accumulate([gradients])
        optimizer.finish(step, lambda commitment: None)
        seen_M = (before - parameter.detach()) * (plan.expected_batch_size / plan.max_grad_norm)
        ratio_M = (2 * seen_M.double().numpy() - 1) / (2 * variance)
        score_M += np.logaddexp(np.log1p(-q), np.log(q) + ratio_M) if q < 1 else ratio_M
    return score_M[member_M], score_M[~member_M]


def lower_bound(members: np.ndarray, others: np.ndarray, delta: float) -> float:
    """The largest epsilon that the scores rule out everything below, at 95% confidence.

    The threshold is chosen on half of the scores, and judged on the other half.
    """
    best = max(_thresholds(members[::2], others[::2], delta), key=lambda pair: pair[0])[1]
    return max(0.0, _bound(members[1::2], others[1::2], best, delta))


def _thresholds(members: np.ndarray, others: np.ndarray, delta: float) -> list[tuple[float, float]]:
    """For each of many thresholds the bound that it would give, and the threshold."""
    everything = np.sort(np.concatenate([members, others]))
    ends = np.unique(
        np.concatenate(
            [everything[:: max(1, len(everything) // 400)], everything[:50], everything[-50:]]
        )
    )
    middles = np.append((ends[1:] + ends[:-1]) / 2, [ends[0] - 1, ends[-1] + 1])
    return [(_bound(members, others, threshold, delta), float(threshold)) for threshold in middles]


def _bound(members: np.ndarray, others: np.ndarray, threshold: float, delta: float) -> float:
    """Epsilon from upper ends of the false positive and false negative rates, the larger of both directions."""
    positives = _upper_end(int((others > threshold).sum()), len(others))
    negatives = _upper_end(int((members <= threshold).sum()), len(members))
    sides = [(1 - delta - negatives, positives), (1 - delta - positives, negatives)]
    return max(math.log(right / wrong) if right > 0 else 0.0 for right, wrong in sides)


def _upper_end(count: int, total: int) -> float:
    """Clopper and Pearson's upper end, at half of the error for each of the two rates."""
    return 1.0 if count == total else float(beta.ppf(1 - _ERROR / 2, count + 1, total - count))
