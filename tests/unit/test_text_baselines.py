"""The baselines without a language model."""

import numpy as np
import torch

from post_dist.data.tasks import Examples
from post_dist.stages.evaluate.text_baselines import MAJORITY, TF_IDF, text_baselines

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
