"""Metrics of class scores and of generated responses.

Shapes: N examples, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def classification_metrics(scores_NC: np.ndarray, classes_N: np.ndarray) -> dict[str, Any]:
    """Compute accuracy and AUC of class scores.

    AUC depends only on the ranking of the examples. Accuracy also depends on the threshold between
    the classes, so a biased threshold lowers it.

    Args:
        scores_NC: class scores.
        classes_N: the correct classes.

    Returns:
        `accuracy_micro`, `accuracy_macro`, `interval_95` of the micro accuracy, `auc` and `n`. The
        AUC is the mean over the classes that occur, each against all others; None if only one class
        occurs.
    """
    from sklearn.metrics import balanced_accuracy_score  # takes a second

    predicted_N = scores_NC.argmax(axis=1)
    correct_N = predicted_N == classes_N
    return {
        "accuracy_micro": float(correct_N.mean()),
        "accuracy_macro": float(balanced_accuracy_score(classes_N, predicted_N)),
        "interval_95": wilson_interval(int(correct_N.sum()), len(correct_N)),
        "auc": _mean_auc(scores_NC, classes_N),
        "n": len(correct_N),
    }


def response_metrics(generated: Sequence[str], wanted: Sequence[str]) -> dict[str, Any]:
    """Compare generated responses with those of the data.

    Args:
        generated: responses of a model.
        wanted: the response to each example in the data.

    Returns:
        `exact_match`, which ignores differences in white space, and its `interval_95`; `rouge_1`
        and `rouge_l`, mean F1 scores with stemming; and the number of examples `n`.
    """
    # Few tasks generate text, and this package takes two seconds to import.
    from rouge_score.rouge_scorer import RougeScorer

    # Stemming makes "films" match "film", as is usual for ROUGE.
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    exact = []
    rouge_1 = []
    rouge_l = []
    for response, reference in zip(generated, wanted, strict=True):
        exact.append(response.split() == reference.split())
        scores = scorer.score(reference, response)
        rouge_1.append(scores["rouge1"].fmeasure)
        rouge_l.append(scores["rougeL"].fmeasure)
    return {
        "exact_match": sum(exact) / len(exact),
        "interval_95": wilson_interval(sum(exact), len(exact)),
        "rouge_1": float(np.mean(rouge_1)),
        "rouge_l": float(np.mean(rouge_l)),
        "n": len(exact),
    }


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """Compute Wilson's 95% score interval of a proportion.

    Args:
        successes: number of successes.
        total: number of trials.

    Returns:
        Lower and upper end.
    """
    from scipy.stats import binomtest  # takes a second

    # Unlike the normal approximation, Wilson's interval stays valid for proportions near 0 and 1.
    interval = binomtest(successes, total).proportion_ci(0.95, method="wilson")
    return (float(interval.low), float(interval.high))


def _mean_auc(scores_NC: np.ndarray, classes_N: np.ndarray) -> float | None:
    """Compute the mean AUC over the classes that occur, each against all others."""
    from sklearn.metrics import roc_auc_score  # takes a second

    # AUC compares examples of a class with all others, so it needs at least two classes.
    present = np.unique(classes_N)
    if len(present) < 2:
        return None
    areas = []
    for index in present:
        # Rank the examples by the margin of this class over the best of the others.
        others = np.delete(scores_NC, index, axis=1).max(axis=1)
        margin_N = scores_NC[:, index] - others
        areas.append(roc_auc_score(classes_N == index, margin_N))
    return float(np.mean(areas))
