"""Private votes: who votes, how the votes are counted, and how much noise they need.

Two data sets are neighbors if one has one more example than the other. Every function here bounds
what one example can change, and `tests/unit/test_rivals_privacy.py` adds and removes examples.

Shapes: N private examples or public texts, C classes, M candidates, d width.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from post_dist.privacy.calibration import calibrated
from post_dist.privacy.plan import PrivacyPlan

GROUP_SENSITIVITY = 2**0.5
"""One example moves one group's vote from a class to another: two counts change by 1."""
NEAREST_SENSITIVITY = 1.0
"""One example casts one vote more or less."""

Shot = tuple[str, int]
"""A text and its class."""


@dataclass(frozen=True)
class Budget:
    """What the votes may reveal.

    Attributes:
        epsilon: target epsilon; None for votes without noise.
        delta: the delta at which epsilon is stated.
    """

    epsilon: float | None
    delta: float


def noise_deviation(budget: Budget, histograms: int, sensitivity: float) -> float:
    """Return the standard deviation of the Gaussian noise on every count.

    Args:
        budget: what all histograms together may reveal.
        histograms: how many histograms are published.
        sensitivity: Euclidean norm of what one example changes in each of them.
    """
    if budget.epsilon is None:
        return 0.0
    # Every histogram reads all examples, so a step of this plan samples with probability 1.
    plan = PrivacyPlan(
        noise_multiplier=1.0,
        sampling_probability=1.0,
        steps=histograms,
        max_grad_norm=1.0,
        delta=budget.delta,
        expected_batch_size=1.0,
    )
    return calibrated(plan, budget.epsilon).noise_multiplier * sensitivity


def with_noise(counts: np.ndarray, deviation: float, noise: np.random.Generator) -> np.ndarray:
    """Return counts with Gaussian noise.

    The generator is good enough for a row of a table, and not for votes that leave a machine.
    """
    noisy: np.ndarray = counts + noise.normal(0.0, 1.0, counts.shape) * deviation
    return noisy


def disjoint_contexts(
    examples: Sequence[Shot], groups: int, shots_per_class: int, salt: str
) -> list[list[Shot]]:
    """Divide examples into groups, and choose the shots of each group.

    An example's group is a hash of its text. So an example more or less changes the shots of one
    group alone, which a division into equal parts would not promise.

    Args:
        examples: the private examples, each text once.
        groups: number of groups.
        shots_per_class: most examples of a class that a group shows.
        salt: makes another division.

    Returns:
        The shots of each group. A group may be empty.
    """
    # The order is that of the hashes, so it does not depend on the file.
    placed = sorted((_digest(shot[0], salt), shot) for shot in examples)
    contexts: list[list[Shot]] = [[] for _ in range(groups)]
    for digest, shot in placed:
        context = contexts[digest % groups]
        of_class = sum(other[1] == shot[1] for other in context)
        if of_class < shots_per_class:
            context.append(shot)
    return contexts


def group_histograms(choices: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the votes of groups.

    Args:
        choices: the class that each group (row) chooses for each public text (column).
        num_classes: number of classes C.

    Returns:
        How many groups choose each class [N, C] of each text.
    """
    votes = choices[:, :, None] == np.arange(num_classes)
    counts_NC: np.ndarray = votes.sum(axis=0)
    return counts_NC


def nearest_histogram(
    private_Nd: np.ndarray,
    private_classes_N: np.ndarray,
    candidates_nd: np.ndarray,
    candidate_classes_M: np.ndarray,
) -> np.ndarray:
    """Count how many private texts have each candidate [M] as the nearest one of their class.

    Args:
        private_Nd: embeddings of the private texts, each of length 1.
        private_classes_N: their classes.
        candidates_nd: embeddings [M, d] of the candidates, each of length 1.
        candidate_classes_M: their classes. Every class has a candidate.
    """
    counts_M = np.zeros(len(candidates_nd), dtype=int)
    for index in np.unique(candidate_classes_M):
        of_class = np.flatnonzero(candidate_classes_M == index)
        voters = private_Nd[private_classes_N == index]
        nearest_n = (voters @ candidates_nd[of_class].T).argmax(axis=1)
        counts_M[of_class] += np.bincount(nearest_n, minlength=len(of_class))
    return counts_M


def _digest(text: str, salt: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{salt}\n{text}".encode()).digest()[:8])
