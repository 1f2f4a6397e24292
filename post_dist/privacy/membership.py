"""Membership inference by likelihood ratio (LiRA, Carlini et al., arXiv 2112.03570).

The attacker knows the text and the label of a row, and asks whether a prompt was tuned on it.
Shadow prompts that were tuned with and without the row show how confident a model is in either
case. Each shadow prompt is also attacked in turn, with the others as its shadows.

Shapes: S shadow prompts, N rows, C classes.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp
from sklearn.metrics import roc_auc_score, roc_curve

FALSE_POSITIVE_RATE = 0.01
"""The rate at which the true-positive rate is stated."""


@dataclass(frozen=True)
class AttackSuccess:
    """The success of an attack: how well it tells members from others.

    Attributes:
        auc: area under the ROC curve; 0.5 is guessing.
        auc_error: standard error of the AUC, from its spread over the attacked prompts.
        true_positive_rate: share of the members found at `FALSE_POSITIVE_RATE`.
    """

    auc: float
    auc_error: float
    true_positive_rate: float


def balanced_members(shadows: int, rows: int, seed: int) -> np.ndarray:
    """Decide which rows each shadow prompt is tuned on: each pair of them shares all rows.

    Args:
        shadows: number S of shadow prompts, which is even.
        rows: number N of rows, which is even.
        seed: seed of the choice.

    Returns:
        Booleans [S, N]. Shadow prompts 2k and 2k + 1 have half of the rows each.
    """
    generator = np.random.default_rng(seed)
    half_N = np.arange(rows) < rows // 2
    members = []
    for _ in range(shadows // 2):
        first_N = generator.permutation(half_N)
        members += [first_N, ~first_N]
    return np.stack(members)


def confidences(scores_NC: np.ndarray, classes_N: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p)) of the correct class of each row [N], from class scores."""
    rows_N = np.arange(len(classes_N))
    correct_N = scores_NC[rows_N, classes_N]
    others_NC = scores_NC.astype(float)
    others_NC[rows_N, classes_N] = -np.inf
    margins_N: np.ndarray = correct_N - logsumexp(others_NC, axis=1)
    return margins_N


def attack(confidences_SN: np.ndarray, members_SN: np.ndarray) -> AttackSuccess:
    """Attack each shadow prompt with the others.

    Args:
        confidences_SN: confidence in each row with each shadow prompt.
        members_SN: which rows each shadow prompt was tuned on, as `balanced_members` gives them,
            for 4 shadow prompts or more.
    """
    ratios = []
    areas = []
    pairs = np.arange(len(members_SN)) // 2
    for target, members_N in enumerate(members_SN):
        # The other half of the target's pair is left out as well. Otherwise each row would have
        # fewer shadows on the side of the target, and their number would tell the truth.
        others = pairs != pairs[target]
        ratios_N = _log_ratios(confidences_SN[target], confidences_SN[others], members_SN[others])
        ratios.append(ratios_N)
        areas.append(roc_auc_score(members_N, ratios_N))
    # One threshold for all prompts: an attacker cannot choose one for each by its result.
    false_rates, true_rates, _ = roc_curve(members_SN.ravel(), np.concatenate(ratios))
    return AttackSuccess(
        auc=float(np.mean(areas)),
        auc_error=float(np.std(areas, ddof=1) / np.sqrt(len(areas))),
        true_positive_rate=float(true_rates[false_rates <= FALSE_POSITIVE_RATE].max()),
    )


def _log_ratios(
    confidences_N: np.ndarray, shadows_SN: np.ndarray, members_SN: np.ndarray
) -> np.ndarray:
    """Return log(p(confidence | member) / p(confidence | not a member)) of each row.

    Both densities are normal. Each row has its own means. With few shadow prompts, a variance for
    each row would be mostly noise, so all rows share one for each case.
    """
    inside_N, inside_deviation = _normal(shadows_SN, members_SN)
    outside_N, outside_deviation = _normal(shadows_SN, ~members_SN)
    inside_z_N = (confidences_N - inside_N) / inside_deviation
    outside_z_N = (confidences_N - outside_N) / outside_deviation
    ratios_N: np.ndarray = (outside_z_N**2 - inside_z_N**2) / 2
    ratios_N += np.log(outside_deviation / inside_deviation)
    return ratios_N


def _normal(shadows_SN: np.ndarray, chosen_SN: np.ndarray) -> tuple[np.ndarray, float]:
    """Return each row's mean over its chosen shadow prompts, and their common deviation."""
    counts_N = chosen_SN.sum(axis=0)
    means_N = (shadows_SN * chosen_SN).sum(axis=0) / counts_N
    squares_SN = (shadows_SN - means_N) ** 2 * chosen_SN
    # A mean of few values takes a degree of freedom from each row.
    freedom = counts_N.sum() - len(counts_N)
    # Equal confidences have no deviation, and any small one gives the same ranking.
    deviation = max(float(np.sqrt(squares_SN.sum() / max(freedom, 1))), 1e-12)
    return means_N, deviation
