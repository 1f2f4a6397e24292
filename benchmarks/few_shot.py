"""Few labeled texts in front of each text: true ones, or public ones that private groups label.

The private version is PromptPATE (arXiv 2305.15594) in its simplest form. Disjoint groups of
private examples are contexts of the LLM, and vote on the classes of public texts. The noisy votes
label the public texts, and the clearest of them are the context that labels all new texts.

Shapes: N texts, C classes.
"""

import random
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from noisy_votes import (
    GROUP_SENSITIVITY,
    Budget,
    Shot,
    disjoint_contexts,
    group_histograms,
    noise_deviation,
    with_noise,
)
from task_model import TaskModel, balanced

from post_dist.data.tasks import Examples

GROUPS = 100
QUERIES = 20
_SHOTS_OF_A_GROUP = 4
SHOTS = 8
"""Labeled texts in front of a new text."""
_CALIBRATION_TEXTS = 64


class FewShot:
    """Labels texts in context.

    Args:
        model: the LLM, bound to the task.
        private: the training examples.
        seed: draws groups, public texts and noise.
    """

    def __init__(self, model: TaskModel, private: Examples, seed: int) -> None:
        self._model = model
        self._private: list[Shot] = list(zip(private.texts, private.classes, strict=True))
        self._seed = seed
        drawn = model.some_public_texts(QUERIES + _CALIBRATION_TEXTS, seed)
        self._queries = drawn[:QUERIES]
        self._calibration = drawn[QUERIES:]

    def with_true_labels(self, texts: list[str]) -> torch.Tensor:
        """Return class scores [N, C] behind private examples, without any privacy."""
        shuffled = random.Random(self._seed).sample(self._private, len(self._private))
        shots: list[Shot] = []
        for index in range(self._model.num_classes):
            of_class = [shot for shot in shuffled if shot[1] == index]
            shots += of_class[: shots_per_class(self._model.num_classes)]
        return self.scores(texts, shots)

    def with_votes(self, texts: list[str], budget: Budget) -> torch.Tensor:
        """Return class scores [N, C] behind public texts that the private groups have labeled.

        Args:
            texts: the texts to label.
            budget: what the votes may reveal.
        """
        deviation = noise_deviation(budget, QUERIES, GROUP_SENSITIVITY)
        noise = np.random.default_rng([self._seed, round(100 * (budget.epsilon or 0))])
        noisy_NC = with_noise(self._votes_NC, deviation, noise)
        shots = clearest(noisy_NC, self._queries, shots_per_class(self._model.num_classes))
        return self.scores(texts, shots)

    @cached_property
    def _votes_NC(self) -> np.ndarray:
        """The votes of all groups. They are the same for every epsilon."""
        contexts = disjoint_contexts(
            self._private,
            GROUPS,
            shots_per_class(self._model.num_classes, _SHOTS_OF_A_GROUP),
            f"groups {self._seed}",
        )
        choices = []
        for shots in contexts:
            # What a group votes depends on its own examples and on public texts alone.
            scores_NC = self._model.scores(self._queries, self._mixed(shots))
            choices.append(balanced(scores_NC, scores_NC).argmax(dim=1).numpy())
        return group_histograms(np.stack(choices), self._model.num_classes)

    def scores(self, texts: list[str], shots: Sequence[Shot]) -> torch.Tensor:
        """Return class scores [N, C] of texts behind labeled ones, with equal class shares."""
        mixed = self._mixed(shots)
        public_NC = self._model.scores(self._calibration, mixed)
        return balanced(self._model.scores(texts, mixed), public_NC)

    def _mixed(self, shots: Sequence[Shot]) -> list[Shot]:
        """Return shots in a random order: with sorted classes, the LLM repeats the last one."""
        return random.Random(self._seed).sample(list(shots), len(shots))


def shots_per_class(num_classes: int, shots: int = SHOTS) -> int:
    """Return how many labeled texts of each class make about a number of shots."""
    return max(1, shots // num_classes)


def clearest(votes_NC: np.ndarray, texts: Sequence[str], count: int) -> list[Shot]:
    """Choose the texts that the votes label most clearly, as many of each class.

    Args:
        votes_NC: noisy votes.
        texts: the texts [N] that were voted on.
        count: how many texts of each class.

    Returns:
        The texts with the class of most votes. A class with too few of them takes the texts in
        which it comes nearest to the others.
    """
    shots: list[Shot] = []
    taken: set[int] = set()
    for index in range(votes_NC.shape[1]):
        others_N = np.delete(votes_NC, index, axis=1).max(axis=1)
        by_margin = np.argsort(others_N - votes_NC[:, index])
        free = [int(query) for query in by_margin if int(query) not in taken]
        taken.update(free[:count])
        shots += [(texts[query], index) for query in free[:count]]
    return shots
