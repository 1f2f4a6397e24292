"""The baselines without a language model."""

import math

import numpy as np
import pytest
import torch

from post_dist.artifacts.evaluation_table import MAJORITY, TF_IDF
from post_dist.data.tasks import Examples
from post_dist.privacy.accounting import account
from post_dist.stages.evaluate import private_text_baseline
from post_dist.stages.evaluate.private_text_baseline import plan_like, private_text_scores
from post_dist.stages.evaluate.text_baselines import text_baselines

TEXTS = {
    0: "the goalkeeper saved a penalty",
    1: "shares fell after the rate",
    2: "a probe left orbit",
}


def examples(*classes: int) -> Examples:
    texts = [f"{TEXTS[label]} {number}" for number, label in enumerate(classes)]
    return Examples(texts, list(classes), responses=[], users=[])


def test_each_text_gets_the_class_of_its_words_and_the_majority_is_one_class() -> None:
    found = text_baselines(examples(0, 1, 2, 2), [TEXTS[1], TEXTS[0], TEXTS[2]], 3)
    assert found[TF_IDF].argmax(dim=1).tolist() == [1, 0, 2]
    assert found[MAJORITY].argmax(dim=1).tolist() == [2, 2, 2]
    # The scores are log-probabilities, so they are comparable between texts.
    torch.testing.assert_close(found[TF_IDF].exp().sum(dim=1), torch.ones(3))


def test_a_class_without_training_examples_is_never_chosen() -> None:
    found = text_baselines(examples(0, 2, 0, 2), [TEXTS[1], TEXTS[2]], 4)
    assert found[TF_IDF].shape == (2, 4)
    assert set(found[TF_IDF].argmax(dim=1).tolist()) <= {0, 2}
    assert np.isfinite(found[TF_IDF].numpy()).all()


def test_one_class_alone_has_a_majority_only() -> None:
    assert list(text_baselines(examples(1, 1), ["x"], 2)) == [MAJORITY]


@pytest.mark.parametrize("text", ["😀🎉", "?!", "", " "])
def test_texts_without_a_word_leave_the_majority(text: str) -> None:
    training = Examples([text, text + text], [0, 1], responses=[], users=[])
    assert list(text_baselines(training, [text, "word"], 2)) == [MAJORITY]
    scores_NC = private_text_scores(training, [text, "word"], 2, plan_like(STATEMENT))
    assert scores_NC.shape == (2, 2)
    # Texts to classify need no word that is known.
    assert list(text_baselines(examples(0, 1), [text], 2)) == [MAJORITY, TF_IDF]


STATEMENT = {"epsilon": 8.0, "delta": 1e-4, "declared_examples": 300, "unit": "one example"}


def test_the_private_baseline_has_the_epsilon_of_the_prompt() -> None:
    plan = plan_like(STATEMENT)
    assert 7.9 < account(plan).epsilon <= 8.0
    assert (plan.delta, plan.expected_batch_size) == (1e-4, 300.0)


def test_there_is_no_private_baseline_for_users_or_an_epsilon_out_of_reach() -> None:
    assert plan_like(STATEMENT | {"unit": "one user"}) is None
    assert plan_like(STATEMENT | {"declared_examples": None}) is None
    assert plan_like(STATEMENT | {"epsilon": 1e-3}) is None


def test_the_private_baseline_learns_words_and_adds_noise() -> None:
    training = examples(*(100 * [0, 1, 2]))
    texts = [TEXTS[2], TEXTS[0], TEXTS[1]]
    plan = plan_like(STATEMENT)
    once = private_text_scores(training, texts, 3, plan)
    assert once.argmax(dim=1).tolist() == [2, 0, 1]
    assert not torch.equal(once, private_text_scores(training, texts, 3, plan))


def test_one_example_moves_the_sum_by_the_norm_at_most() -> None:
    features_Nd = private_text_baseline._features([TEXTS[0], "", TEXTS[1], TEXTS[1]])
    weight_Cd = np.random.default_rng(0).normal(size=(3, features_Nd.shape[1]))
    classes_N = np.array([0, 1, 2, 0])

    def total(count: int) -> np.ndarray:
        return private_text_baseline._clipped_sum(
            features_Nd[:count], classes_N[:count], weight_Cd, 0.5
        )

    moved = [float(np.linalg.norm(total(count + 1) - total(count))) for count in range(4)]
    assert max(moved) <= 0.5 + 1e-12
    assert math.isclose(max(moved), 0.5), "some gradient is clipped"
