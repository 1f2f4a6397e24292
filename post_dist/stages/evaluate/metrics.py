"""Metrics of class scores and of generated responses.

Shapes: N examples, C classes.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Japanese
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"  # Chinese characters
)
"""A character of a script without spaces between words."""


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
        and `rouge_l`, mean F1 scores over `words_of`; and the number of examples `n`.
    """
    # Few tasks generate text, and this package takes two seconds to import.
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

    # Stemming makes "films" match "film", as is usual for ROUGE.
    english = DefaultTokenizer(use_stemmer=True)

    class Words(Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            words: list[str] = []
            for word in words_of(text):
                # The default knows no letters but those of English.
                words += english.tokenize(word) if word.isascii() else [word]
            return words

    scorer = RougeScorer(["rouge1", "rougeL"], tokenizer=Words())
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


def words_of(text: str) -> list[str]:
    """Split a text into words for ROUGE: runs of letters and digits, in lower case.

    Chinese, Japanese, Thai, Lao, Khmer and Burmese have no spaces between words. There, each
    character is a word, together with the marks above and below it.
    """
    words: list[str] = []
    is_in_word = False
    is_extensible = False
    for character in unicodedata.normalize("NFC", text.lower()):
        if unicodedata.category(character).startswith("M"):
            # A mark belongs to the letter before it, and one behind a space to none.
            if is_in_word:
                words[-1] += character
            continue
        is_single = _WITHOUT_SPACES.match(character) is not None
        is_in_word = character.isalnum()
        if is_in_word and is_extensible and not is_single:
            words[-1] += character
        elif is_in_word:
            words.append(character)
        is_extensible = is_in_word and not is_single
    return words


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
