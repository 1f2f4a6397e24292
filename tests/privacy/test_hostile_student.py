"""One example moves a step by the clipping norm at most, whatever the student is made of."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from privacy.hostile_student import ATTACKS, attacks, largest_change, write_hostile_student


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run a test with a number of threads. Kernels divide their work by it."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("kind", "precision"), ATTACKS)
def test_a_student_made_of_rounding_moves_no_sum_by_more_than_the_clipping_norm(
    tmp_path: Path, threads: int, kind: str, precision: str
) -> None:
    _, tried = attacks(write_hostile_student(tmp_path, kind), precision, lengths=(48,))
    assert tried.is_clipped()
    assert largest_change(tried, trials=3, seed=threads) <= 1 + 1e-6
