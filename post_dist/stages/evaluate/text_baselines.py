"""Baselines without a language model: the majority class, and TF-IDF with logistic regression.

They are fitted to the training split without privacy. A prompt that loses to them is not worth its
cost on this task.

Shapes: N examples, C classes.
"""

from collections.abc import Sequence

import numpy as np
import torch

from post_dist.artifacts.evaluation_table import MAJORITY, TF_IDF
from post_dist.data.tasks import Examples

_INVERSE_REGULARIZATION = 10.0
"""`C` of scikit-learn. With word pairs, the default of 1 underfits some thousand short texts."""
_NEVER = -1e9
"""Score of a class without training examples."""


def text_baselines(
    training: Examples, texts: Sequence[str], num_classes: int
) -> dict[str, torch.Tensor]:
    """Classify texts with the baselines.

    Args:
        training: the examples to fit.
        texts: the texts [N] to classify.
        num_classes: number C of classes of the task.

    Returns:
        The class scores [N, C] by the name of the baseline. TF-IDF is left out if it cannot be
        fitted: it needs two classes or more among the training examples, and a word.
    """
    counts_C = np.bincount(training.classes, minlength=num_classes)
    found = {MAJORITY: torch.from_numpy(counts_C).float().expand(len(texts), -1).clone()}
    if np.count_nonzero(counts_C) > 1:
        scores_NC = _tf_idf_scores(training, texts, num_classes)
        if scores_NC is not None:
            found[TF_IDF] = scores_NC
    return found


def _tf_idf_scores(
    training: Examples, texts: Sequence[str], num_classes: int
) -> torch.Tensor | None:
    """Return the log-probabilities [N, C] of logistic regression on words and word pairs.

    Returns:
        None if it cannot be fitted.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    # One letter may be a word, and texts may be in any language.
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+")
    classifier = make_pipeline(words, LogisticRegression(C=_INVERSE_REGULARIZATION, max_iter=1000))
    try:
        classifier.fit(training.texts, training.classes)
    except ValueError:
        # Texts of emoji or punctuation alone have no word. Other rows of the table need none.
        return None
    scores_NC = np.full((len(texts), num_classes), _NEVER)
    scores_NC[:, classifier.classes_] = classifier.predict_log_proba(texts)
    return torch.from_numpy(scores_NC).float()
