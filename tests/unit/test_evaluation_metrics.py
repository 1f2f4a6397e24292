"""Metrics of the evaluation."""

import math

import numpy as np
import pytest

from post_dist.stages.evaluate.metrics import (
    classification_metrics,
    response_metrics,
    wilson_interval,
    words_of,
)


def wilson_by_hand(successes: int, total: int) -> tuple[float, float]:
    """Compute the interval from Wilson's formula (1927)."""
    z = 1.959963984540054
    share = successes / total
    center = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    variance = share * (1 - share) / total + z**2 / (4 * total**2)
    half = z / (1 + z**2 / total) * math.sqrt(variance)
    return (center - half, center + half)


@pytest.mark.parametrize(
    ("successes", "total"),
    [(0, 1), (1, 1), (0, 20), (7, 20), (20, 20), (626, 835), (50_000, 99_999)],
)
def test_the_interval_is_wilson_s(successes: int, total: int) -> None:
    expected = wilson_by_hand(successes, total)
    assert wilson_interval(successes, total) == pytest.approx(expected, abs=1e-12)


def test_accuracy_and_auc_of_two_classes() -> None:
    scores_NC = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
    metrics = classification_metrics(scores_NC, np.array([0, 1, 1, 1]))
    assert metrics["accuracy_micro"] == 0.75
    assert metrics["accuracy_macro"] == pytest.approx((1 + 2 / 3) / 2)
    # The margins of class 1 are 3, -1 and 1, against -1 of class 0: two pairs right, one tie.
    assert metrics["auc"] == pytest.approx(2.5 / 3)
    assert metrics["n"] == 4


def test_one_class_alone_has_no_auc() -> None:
    scores_NC = np.array([[2.0, 1.0], [0.0, 3.0]])
    assert classification_metrics(scores_NC, np.array([0, 0]))["auc"] is None


def test_responses_match_apart_from_white_space() -> None:
    metrics = response_metrics(["a  good film ", "a bad film"], ["a good film", "a good film"])
    assert metrics["exact_match"] == 0.5
    assert metrics["rouge_1"] == pytest.approx((1 + 2 / 3) / 2)
    assert metrics["n"] == 2


@pytest.mark.parametrize(
    "text", ["привет мир", "你好世界", "مَرحبا بالعالم", "हिन्दी भाषा", "ภาษาไทย", "한국어", "été"]
)
def test_a_right_response_has_the_full_rouge_in_any_script(text: str) -> None:
    metrics = response_metrics([text], [text])
    assert (metrics["rouge_1"], metrics["rouge_l"]) == (1.0, 1.0)
    assert response_metrics(["other words"], [text])["rouge_1"] == 0.0


def test_words_are_split_as_the_docs_say() -> None:
    assert words_of("हिन्दी भाषा, e\u0301te\u0301_ÉTÉ!") == ["हिन्दी", "भाषा", "été", "été"]
    assert words_of("你好a世3か月") == ["你", "好", "a", "世", "3", "か", "月"]
    assert words_of("ที่นี่ x") == ["ที่", "นี่", "x"]
    assert words_of(" \u0301 ?!") == []


def test_rouge_of_english_is_that_of_its_package() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    pieces = ["Films", "film,", "co-operate", "_a_b", "3.5", "don't", "“flies”", "dies!", "\t", ""]
    generator = np.random.default_rng(0)
    for _ in range(200):
        response, reference = (" ".join(generator.choice(pieces, 6)) for _ in range(2))
        scores = scorer.score(reference, response)
        metrics = response_metrics([response], [reference])
        assert metrics["rouge_1"] == scores["rouge1"].fmeasure
        assert metrics["rouge_l"] == scores["rougeL"].fmeasure
