"""Statistics of public text without labels: they choose alpha, and compare public data sets.

Shapes: N examples, C classes.
"""

import math

import torch
from sklearn.metrics import cohen_kappa_score

_STANDARD_ERRORS = 2
"""How far Cohen's kappa must lie above 0 to count as agreement.

One standard error of a kappa of 0 is 1/sqrt(N) for two equally frequent classes, and less elsewhere
(Fleiss, Cohen and Everitt 1969).
"""

_NO_EVIDENCE = 0.5
"""alpha where the ratio of agreements would be one of two accidents."""


def class_information(scores_NC: torch.Tensor) -> float:
    """Compute how much a text tells a model about its class, as a mutual information.

    The mutual information of text and predicted class is the entropy of the mean distribution minus
    the mean entropy. Of several public data sets, the one on which the prompted student reaches the
    highest value has most to teach.

    Args:
        scores_NC: class scores.

    Returns:
        Nats, between 0 and log C. It is 0 where the model predicts the same for every text or is
        never sure, and log C where it is always sure and finds all classes equally often.
    """
    p_NC = scores_NC.double().softmax(dim=1)
    entropy_of_mean = _entropy(p_NC.mean(dim=0))
    mean_entropy = _entropy(p_NC).mean()
    return float(entropy_of_mean - mean_entropy)


def alpha_by_agreement(
    source_NC: torch.Tensor, source_prompted_NC: torch.Tensor, target_NC: torch.Tensor
) -> float:
    """Estimate alpha of the published loss from how often three models agree on public text.

    The paper's alpha is min(1, (ZS - RG) / (C - RG)) (eq. 6), with the accuracies of the target
    (ZS), of the prompted student (C) and of guessing (RG). They need private labels. Where the
    errors of two models are independent, their agreement beyond chance (Cohen's kappa) is the
    product of what each gets right beyond chance. The agreement of student and target, divided by
    that of student and prompted student, is then the paper's ratio.

    Args:
        source_NC: class scores of the student.
        source_prompted_NC: class scores of the student with its prompt.
        target_NC: class scores of the target.

    Returns:
        alpha between 0 and 1. It is 0.5 where the student agrees with its prompted self no more
        than by chance, for example because it predicts one class for nearly every text.
    """
    source_N = source_NC.argmax(dim=1).numpy()
    prompted_N = source_prompted_NC.argmax(dim=1).numpy()
    target_N = target_NC.argmax(dim=1).numpy()

    agreement_with_prompted = cohen_kappa_score(source_N, prompted_N)
    by_chance = _STANDARD_ERRORS / math.sqrt(len(source_N))
    # Written so that an undefined kappa (NaN, from constant predictions) counts as no evidence.
    if not agreement_with_prompted > by_chance:
        return _NO_EVIDENCE
    ratio = cohen_kappa_score(source_N, target_N) / agreement_with_prompted
    return float(min(1.0, max(0.0, ratio)))


def _entropy(p: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(p).sum(dim=-1)
