"""The votes of the rivals: their noise by an independent formula, and what one example changes."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.stats import norm

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
GROUPS = 10
CLASSES = 3
QUERIES = 6
DELTA = 6500**-1.1


@pytest.fixture
def votes(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import noisy_votes

    return noisy_votes


def gaussian_delta(epsilon: float, sensitivity: float, deviation: float) -> float:
    """The analytic Gaussian mechanism: theorem 8 of Balle and Wang, arXiv 1805.06530."""
    shift = sensitivity / (2 * deviation)
    loss = epsilon * deviation / sensitivity
    return float(norm.cdf(shift - loss) - math.exp(epsilon) * norm.cdf(-shift - loss))


@pytest.mark.parametrize("epsilon", [8, 1])
@pytest.mark.parametrize(
    ("histograms", "sensitivity_name"), [(20, "GROUP_SENSITIVITY"), (2, "NEAREST_SENSITIVITY")]
)
def test_the_noise_is_that_of_the_analytic_gaussian_mechanism(
    votes: ModuleType, epsilon: int, histograms: int, sensitivity_name: str
) -> None:
    sensitivity = getattr(votes, sensitivity_name)
    deviation = votes.noise_deviation(votes.Budget(epsilon, DELTA), histograms, sensitivity)
    # Histograms with independent noise are one vector, with a sensitivity of sqrt(histograms).
    of_all = sensitivity * histograms**0.5
    assert gaussian_delta(epsilon, of_all, deviation) <= DELTA
    # Less noise by half a percent would miss the target.
    assert gaussian_delta(epsilon, of_all, 0.995 * deviation) > DELTA


def test_no_epsilon_has_no_noise(votes: ModuleType) -> None:
    assert votes.noise_deviation(votes.Budget(None, DELTA), 20, votes.GROUP_SENSITIVITY) == 0


def changes(total: int) -> Iterator[tuple[int, list[int]]]:
    """Each example, and all examples without it."""
    for left_out in range(total):
        yield left_out, [index for index in range(total) if index != left_out]


def largest_change(total: int, histograms: Callable[[list[int]], np.ndarray]) -> np.ndarray:
    """The largest Euclidean norm of what one example changes in each histogram."""
    whole = histograms(list(range(total)))
    norms = []
    for _, others in changes(total):
        norms.append(np.linalg.norm(whole - histograms(others), axis=-1))
    return np.max(norms, axis=0)


def test_one_example_moves_one_vote_of_a_group(votes: ModuleType) -> None:
    examples = [(f"text {index}", index % CLASSES) for index in range(60)]

    def histograms(kept: list[int]) -> np.ndarray:
        contexts = votes.disjoint_contexts(
            [examples[index] for index in kept], GROUPS, shots_per_class=1, salt="a"
        )
        choices = []
        for shots in contexts:
            # A model whose answer depends on everything that it reads.
            answers = np.random.default_rng(list(repr(shots).encode()))
            choices.append(answers.integers(CLASSES, size=QUERIES))
        return votes.group_histograms(np.stack(choices), CLASSES)

    assert histograms(list(range(60))).sum(axis=1).tolist() == [GROUPS] * QUERIES
    found = largest_change(60, histograms)
    # The bound is reached, so a smaller one would be wrong.
    assert found.max() == pytest.approx(votes.GROUP_SENSITIVITY)


def test_one_example_casts_one_vote_for_a_synthetic_text(votes: ModuleType) -> None:
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(80, 4))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    private, synthetic = embeddings[:50], embeddings[50:]
    classes = np.arange(50) % CLASSES
    synthetic_classes = np.arange(30) % CLASSES

    def histogram(kept: list[int]) -> np.ndarray:
        return votes.nearest_histogram(private[kept], classes[kept], synthetic, synthetic_classes)

    assert histogram(list(range(50))).sum() == 50
    found = largest_change(50, histogram)
    assert found == pytest.approx(votes.NEAREST_SENSITIVITY)


def test_a_text_votes_for_its_own_class(votes: ModuleType) -> None:
    same = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    counts = votes.nearest_histogram(same[:1], np.array([1]), same, np.array([0, 1, 1]))
    assert counts.tolist() == [0, 1, 0]
