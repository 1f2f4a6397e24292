"""How good class scores or written responses are.

Shapes: N rows, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

_Z_95 = 1.959963984540054


def measure_classes(scores_NC: np.ndarray, classes_N: np.ndarray) -> dict[str, Any]:
    """Micro and macro accuracy, Wilson's 95% interval of the micro one, and AUC (one class against the rest; None for rows of one class).

    AUC sees the ranking alone: beside it, accuracy shows how much a biased threshold costs.
    """
    right = scores_NC.argmax(axis=1) == classes_N
    present = np.unique(classes_N)
    areas = (
        [roc_auc_score(classes_N == index, _margin(scores_NC, index)) for index in present]
        if len(present) > 1
        else []
    )
    return {
        "accuracy_micro": float(right.mean()),
        "accuracy_macro": float(balanced_accuracy_score(classes_N, scores_NC.argmax(axis=1))),
        "interval_95": wilson_interval(int(right.sum()), len(right)),
        "auc": float(np.mean(areas)) if areas else None,
        "n": len(right),
    }


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion."""
    share, z2 = right / total, _Z_95**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z_95 / (1 + z2 / total) * (share * (1 - share) / total + z2 / (4 * total**2)) ** 0.5
    return (middle - half, middle + half)


def _margin(scores_NC: np.ndarray, index: int) -> np.ndarray:
    """How far a class is ahead of the best other one."""
    others = np.delete(scores_NC, index, axis=1)
    margin: np.ndarray = scores_NC[:, index] - others.max(axis=1)
    return margin


def measure_responses(written: Sequence[str], wanted: Sequence[str]) -> dict[str, Any]:
    """The share of responses that are the wanted ones word for word, white space apart; the mean F1 of ROUGE-1 and ROUGE-L, stemmed."""
    exact = [
        " ".join(one.split()) == " ".join(other.split())
        for one, other in zip(written, wanted, strict=True)
    ]
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = [scorer.score(other, one) for one, other in zip(written, wanted, strict=True)]
    return {
        "exact_match": sum(exact) / len(exact),
        "interval_95": wilson_interval(sum(exact), len(exact)),
        "rouge_1": float(np.mean([score["rouge1"].fmeasure for score in scores])),
        "rouge_l": float(np.mean([score["rougeL"].fmeasure for score in scores])),
        "n": len(exact),
    }
