"""The private mechanism: the checks that the bugs of test_mutants.py fail, and random attacks."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import reads_of
from privacy.all_checks import CHECKS
from privacy.checks import noisy_sums, plan_of, quiet_source
from privacy.clipping_checks import small_among

from post_dist.privacy.mechanism import PrivateOptimizer


@pytest.mark.parametrize("check", CHECKS.values(), ids=lambda check: check.__name__)
def test_mechanism(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("clip_quantile", [None, 0.5])
def test_the_host_reads_no_value_before_the_sum_is_complete(clip_quantile: float | None) -> None:
    parameter = torch.zeros(3, 2, requires_grad=True)
    private = PrivateOptimizer(
        torch.optim.SGD([parameter], lr=1.0),
        plan_of(clip_quantile=clip_quantile),
        quiet_source(),
    )
    assert reads_of(lambda: private.accumulate([torch.randn(4, 3, 2)])) == 0


def test_no_example_moves_the_norm_of_another(two_threads: None) -> None:
    """Two threads add up a long row otherwise when it is alone in its batch."""
    generator = torch.Generator().manual_seed(1)
    split = 0
    for _ in range(30):
        row = torch.randn(1, 57_600, generator=generator, dtype=torch.float64)
        for ulps in range(-8, 9):
            on_edge = row / row.square().sum(dim=1).sqrt() * (1 + ulps * 2.0**-53)
            beside = torch.cat([on_edge, torch.zeros_like(on_edge)])
            alone, first = (part.square().sum(dim=1).sqrt()[0] for part in (on_edge, beside))
            if (alone <= 1) != (first <= 1):
                split += 1
                # A gradient of zero counts for one.
                assert small_among(on_edge, others=1) - small_among(on_edge) == 1
    assert split, "torch.sum rounds a row alike in every batch: this test shows nothing"


EXTREMES = [
    0.0,
    -0.0,
    1e30,
    -1e30,
    3e38,
    1e-45,
    float("nan"),
    float("inf"),
    -float("inf"),
    1.0,
    -1e-3,
]
VALUES = st.one_of(st.sampled_from(EXTREMES), st.floats(width=32))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_no_neighbor_moves_the_sum_past_the_norm(data: st.DataObject, dtype: torch.dtype) -> None:
    """One example more or less, in any split and order, on gradients of two parameters."""
    examples = data.draw(st.lists(st.lists(VALUES, min_size=6, max_size=6), max_size=7))
    more = data.draw(st.lists(VALUES, min_size=6, max_size=6))
    neighbor = data.draw(st.permutations([*examples, more]))
    # In a long gradient the rounding of many coordinates adds up.
    repeat = data.draw(st.sampled_from([1, 1, 500]))

    def total(gradients: list[list[float]]) -> torch.Tensor:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(gradients)), max_size=3)))
        micro_batches = []
        for start, end in zip([0, *cuts], [*cuts, len(gradients)], strict=True):
            chunk = torch.tensor(gradients[start:end], dtype=torch.float64)
            flat = chunk.view(-1, 6).to(dtype).repeat(1, repeat)
            micro_batches.append([flat[:, :2].unsqueeze(2), flat[:, 2:]])
        shapes = [(2, 1), (6 * repeat - 2,)]
        sums = noisy_sums(micro_batches, shapes, source=quiet_source())
        return torch.cat([part.flatten() for part in sums])

    moved = float((total(examples) - total(neighbor)).norm())
    assert moved <= 0.3 * (1 + 1e-6)
