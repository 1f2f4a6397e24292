"""Private synthetic text: Aug-PE (arXiv 2403.01749) in its simplest form, and a head trained on it.

The LLM writes texts of each class. Every private text votes for the nearest of them, and the noisy
votes choose which ones are kept and varied. No private text is shown to the LLM.

Shapes: M synthetic texts, N texts, C classes, d width, m features.
"""

import json
import random
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from few_shot import shots_per_class
from noisy_votes import (
    NEAREST_SENSITIVITY,
    Budget,
    Shot,
    nearest_histogram,
    noise_deviation,
    with_noise,
)
from task_model import TaskModel, balanced, features_like
from torch.nn import functional

TEXTS = 300
"""Synthetic texts of all classes together."""
VOTES = 2
"""How often the private texts vote. Every vote is followed by new variations."""
_KEPT = 0.5
"""Share of a class that survives a vote at most."""
_THRESHOLD = 2.0
"""Fewest votes of a survivor, in standard deviations of the noise."""
_NEW_TOKENS = 32
_START_WORDS = 2
_HEAD_LAYERS = 4
_PUBLIC_TEXTS = 200
_PENALTY = 1e-2
"""Weight of the squared norm of the head. It and the layers were chosen on the validation split of
the reviews: held-out synthetic texts prefer a head that fits what only synthetic texts have."""


class SyntheticText:
    """Writes labeled texts that resemble private ones.

    Args:
        model: the LLM, bound to the task.
        private_Nd: embeddings of the private texts.
        classes_N: their classes.
        opening: what precedes a text that the LLM writes, with {word} for its label word.
        seed: draws everything.
        folder: folder for the texts.
    """

    def __init__(
        self,
        model: TaskModel,
        private_Nd: torch.Tensor,
        classes_N: np.ndarray,
        opening: str,
        seed: int,
        folder: Path,
    ) -> None:
        self._model = model
        self._private_Nd = private_Nd
        self._classes_N = classes_N
        self._opening = opening
        self._seed = seed
        self._folder = folder
        self._public = model.some_public_texts(_PUBLIC_TEXTS, seed)
        self._read: dict[tuple[str, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def head_scores(self, texts: list[str], budget: Budget) -> torch.Tensor:
        """Return class scores [N, C] of a head on the LLM that was trained on synthetic texts.

        Args:
            texts: the texts to label.
            budget: what the votes may reveal.
        """
        # The head learns from synthetic texts alone, so it costs no further privacy.
        written = self.written(budget)
        layers = self._model.last_layers(_HEAD_LAYERS)
        public_Nk, public_NC = self._of_public
        states_nk, of_written_NC = self._model.states([text for text, _ in written], layers)
        classes_N = torch.tensor([index for _, index in written])
        weight_Cm, bias_C = fitted(features_like(states_nk, public_Nk), of_written_NC, classes_N)

        def scores(states_Nk: torch.Tensor, of_words_NC: torch.Tensor) -> torch.Tensor:
            return of_words_NC + features_like(states_Nk, public_Nk) @ weight_Cm.T + bias_C

        of_texts = self._states_of(texts)
        return balanced(scores(*of_texts), scores(public_Nk, public_NC)).float()

    def shots(self, budget: Budget) -> list[Shot]:
        """Return the texts that come first in each class: those with most of the last votes."""
        written = self.written(budget)
        found: list[Shot] = []
        for index in range(self._model.num_classes):
            of_class = [shot for shot in written if shot[1] == index]
            found += of_class[: shots_per_class(self._model.num_classes)]
        return found

    def written(self, budget: Budget) -> list[Shot]:
        """Write texts, let the private texts vote, and vary the texts that were voted for.

        Args:
            budget: what all votes together may reveal.

        Returns:
            The texts with their classes. The survivors of the last vote come first, those with most
            votes before the others.
        """
        file = self._folder / f"synthetic-{self._seed}-{budget.epsilon:g}.json"
        # Two rivals use the texts, and writing them takes most of the time.
        if file.exists():
            return [(text, index) for text, index in json.loads(file.read_text())]
        deviation = noise_deviation(budget, VOTES, NEAREST_SENSITIVITY)
        noise = np.random.default_rng([self._seed, round(100 * (budget.epsilon or 0))])
        torch.manual_seed(self._seed)
        population = list(self._first)
        for _ in range(VOTES):
            noisy_M = with_noise(self._votes(population), deviation, noise)
            population = self._next(population, noisy_M, deviation, noise)
        file.write_text(json.dumps(population, indent=1) + "\n")
        return population

    @cached_property
    def _first(self) -> list[Shot]:
        """The first texts, which know nothing of the private ones."""
        torch.manual_seed(self._seed)
        starts = self._model.some_public_texts(self._of_a_class, self._seed)
        openings = [" ".join(text.split()[:_START_WORDS]) for text in starts]
        return self._continued(
            [(text, index) for index in range(self._model.num_classes) for text in openings]
        )

    @property
    def _of_a_class(self) -> int:
        return TEXTS // self._model.num_classes

    def _continued(self, begun: list[Shot]) -> list[Shot]:
        """Let the LLM finish texts, behind a public sentence that names their class."""
        prompts = []
        for text, index in begun:
            prompts.append(self._opening.format(word=self._model.words[index]) + text)
        ends = self._model.continue_texts(prompts, _NEW_TOKENS)
        return [(text + end, index) for (text, index), end in zip(begun, ends, strict=True)]

    def _votes(self, population: list[Shot]) -> np.ndarray:
        """Count the votes of the private texts, without noise."""
        return nearest_histogram(
            self._embedded(self._private_Nd),
            self._classes_N,
            self._embedded(self._model.embeddings([text for text, _ in population])),
            np.array([index for _, index in population]),
        )

    def _embedded(self, means_Nd: torch.Tensor) -> np.ndarray:
        """Return embeddings of length 1, standardized by public text."""
        embedded_Nd: np.ndarray = features_like(means_Nd, self._public_Nd).numpy()
        return embedded_Nd

    @cached_property
    def _public_Nd(self) -> torch.Tensor:
        return self._model.embeddings(self._public)

    @cached_property
    def _of_public(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._model.states(self._public, self._model.last_layers(_HEAD_LAYERS))

    def _states_of(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the texts to label, once for every epsilon."""
        key = tuple(texts)
        if key not in self._read:
            self._read[key] = self._model.states(texts, self._model.last_layers(_HEAD_LAYERS))
        return self._read[key]

    def _next(
        self,
        population: list[Shot],
        noisy_M: np.ndarray,
        deviation: float,
        noise: np.random.Generator,
    ) -> list[Shot]:
        """Return the survivors of a vote and their variations, as many of each class as before."""
        kept: list[Shot] = []
        begun: list[Shot] = []
        classes_M = np.array([index for _, index in population])
        for index in range(self._model.num_classes):
            of_class = np.flatnonzero(classes_M == index)
            alive = survivors(noisy_M[of_class], deviation)
            chosen = of_class[alive]
            kept += [population[place] for place in chosen]
            # Texts with more votes are varied more often.
            weights = np.maximum(noisy_M[chosen], 1e-3)
            parents = noise.choice(chosen, len(of_class) - len(chosen), p=weights / weights.sum())
            for place in parents:
                words = population[place][0].split()
                begun.append((" ".join(words[: max(1, len(words) // 2)]), index))
        random.Random(self._seed).shuffle(begun)
        return kept + self._continued(begun)


def survivors(noisy_M: np.ndarray, deviation: float) -> np.ndarray:
    """Return the places of the texts of a class that stay, those with most votes first.

    Args:
        noisy_M: their noisy votes.
        deviation: standard deviation of the noise.
    """
    by_votes = np.argsort(-noisy_M)[: max(1, int(_KEPT * len(noisy_M)))]
    above = by_votes[noisy_M[by_votes] > _THRESHOLD * deviation]
    # With much noise no text may pass the threshold, and the first one is kept.
    return above if len(above) else by_votes[:1]


def fitted(
    features_Nm: torch.Tensor, scores_NC: torch.Tensor, classes_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit a linear head by logistic regression.

    Args:
        features_Nm: features of the synthetic texts.
        scores_NC: their scores of the label words, to which the head adds its own.
        classes_N: their classes.

    Returns:
        The weight [C, m] and the bias [C] of the head.
    """
    classes = scores_NC.shape[1]
    weight_Cm = features_Nm.new_zeros(classes, features_Nm.shape[1], requires_grad=True)
    bias_C = features_Nm.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_Cm, bias_C], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        reached_NC = scores_NC + features_Nm @ weight_Cm.T + bias_C
        penalized = functional.cross_entropy(reached_NC, classes_N)
        penalized = penalized + _PENALTY * weight_Cm.square().sum()
        penalized.backward()
        return penalized

    optimizer.step(loss)
    return weight_Cm.detach(), bias_C.detach()
