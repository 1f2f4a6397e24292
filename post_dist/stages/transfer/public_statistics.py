"""What public text tells about the models without a label: for alpha, and for choosing between public texts.

Shapes: N rows, C classes.
"""

import math

import torch
from sklearn.metrics import cohen_kappa_score

_STANDARD_ERRORS = 2
"""Of a kappa that is 0; one is 1/sqrt(N) where two classes are equally frequent, and less elsewhere (Fleiss, Cohen and Everitt 1969)."""


def class_information(scores_NC: torch.Tensor) -> float:
    """How much a text tells a model of its class, in nats: the entropy of the mean distribution less the mean entropy.

    0 where the model says the same of every text or is never sure; log C where it is sure and finds all classes equally often. Of
    several public texts, the one of which the prompted student says most has most to teach.
    """
    p_NC = scores_NC.double().softmax(dim=1)
    return float(_entropy(p_NC.mean(dim=0)) - _entropy(p_NC).mean())


def alpha_by_agreement(
    source_NC: torch.Tensor, source_prompted_NC: torch.Tensor, target_NC: torch.Tensor
) -> float:
    """The published loss' alpha from how often three models agree on public text.

    The paper's is min(1, (ZS - RG) / (C - RG)) (eq. 6), with the accuracies of the target, of the prompted student and of guessing: they
    need private labels. Where errors are independent, the agreement of two beyond chance (Cohen's kappa) is the product of what
    each is right beyond chance, so the plain student's agreement with the target over that with the prompted student is the same ratio.

    Args:
        source_NC: class scores of the student.
        source_prompted_NC: of the prompted student.
        target_NC: of the target.

    Returns:
        alpha; 0.5 where the student agrees with its prompted self no more than chance would have it, as one that says the same of nearly
        every text: the ratio would be that of two accidents.
    """
    plain, prompted, target = (
        scores.argmax(dim=1).numpy() for scores in (source_NC, source_prompted_NC, target_NC)
    )
    own = cohen_kappa_score(plain, prompted)
    by_chance = _STANDARD_ERRORS / math.sqrt(len(plain))
    return (
        float(min(1.0, max(0.0, cohen_kappa_score(plain, target) / own)))
        if own > by_chance
        else 0.5
    )


def _entropy(p: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(p).sum(dim=-1)
