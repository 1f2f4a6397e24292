"""Statistics of public text without labels, to choose alpha and to compare public data sets.

Shapes: N examples, C classes.
"""

import math

import torch
from sklearn.metrics import cohen_kappa_score

LEAST_INFORMATION = 0.01
"""Nats of `class_information` below which scores say the same of all texts."""

_STANDARD_ERRORS = 2
"""Standard errors by which Cohen's kappa must exceed 0 to count as agreement.

The standard error of a kappa of 0 is 1/sqrt(N) for two equally frequent classes. For other classes
it is smaller (Fleiss, Cohen and Everitt 1969).
"""

_NO_EVIDENCE = 0.5
"""alpha if the agreement of student and prompted student may be chance, so a ratio has no meaning.
"""


def class_information(scores_NC: torch.Tensor) -> float:
    """Compute the mutual information of text and predicted class.

    It is the entropy of the mean distribution minus the mean entropy. Among several public data
    sets, the one with the highest value for the prompted student is the most informative.

    Args:
        scores_NC: class scores.

    Returns:
        The mutual information in nats, between 0 and log C. It is 0 if the model makes the same
        prediction for every text. It is log C if the model is always certain and predicts all
        classes equally often.
    """
    p_NC = scores_NC.double().softmax(dim=1)
    entropy_of_mean = _entropy(p_NC.mean(dim=0))
    mean_entropy = _entropy(p_NC).mean()
    return float(entropy_of_mean - mean_entropy)


def alpha_by_agreement(
    source_NC: torch.Tensor, source_prompted_NC: torch.Tensor, target_NC: torch.Tensor
) -> float:
    """Estimate alpha of the published loss from the agreement of three models on public text.

    The paper's alpha is min(1, (ZS - RG) / (C - RG)) (eq. 6), with the accuracies of the target
    (ZS), of the prompted student (C) and of guessing (RG). These accuracies need private labels.
    Agreement beyond chance (Cohen's kappa) does not. If two models make independent errors, it is
    the product of their accuracies beyond chance. The agreement of student and target, divided by
    that of student and prompted student, is then the paper's ratio.

    Args:
        source_NC: class scores of the student.
        source_prompted_NC: class scores of the student with its prompt.
        target_NC: class scores of the target.

    Returns:
        alpha between 0 and 1. It is 0.5 if student and prompted student do not agree beyond chance.
        That happens, for example, if one of them predicts the same class for nearly every text.
    """
    source_N = source_NC.argmax(dim=1).numpy()
    prompted_N = source_prompted_NC.argmax(dim=1).numpy()
    target_N = target_NC.argmax(dim=1).numpy()

    agreement_with_prompted = cohen_kappa_score(source_N, prompted_N)
    by_chance = _STANDARD_ERRORS / math.sqrt(len(source_N))
    # `not >` instead of `<=`: constant predictions give a kappa of NaN, which must count as none.
    if not agreement_with_prompted > by_chance:
        return _NO_EVIDENCE
    ratio = cohen_kappa_score(source_N, target_N) / agreement_with_prompted
    return float(min(1.0, max(0.0, ratio)))


def _entropy(p: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(p).sum(dim=-1)
