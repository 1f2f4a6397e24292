"""The private mechanism as it is: every check that the planted bugs of test_mutants.py must fail, and random attacks on the clip."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from privacy import checks, gradient_checks, spending_checks
from privacy.checks import noisy_sums, quiet_source


@pytest.mark.parametrize(
    "check",
    [*checks.CHECKS, *gradient_checks.CHECKS, *spending_checks.CHECKS],
    ids=lambda check: check.__name__,
)
def test_mechanism(check: Callable[[], None]) -> None:
    check()


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
def test_no_neighbour_moves_the_sum_past_the_norm(data: st.DataObject, dtype: torch.dtype) -> None:
    """One example more or less, in any split and order, on gradients of two parameters."""
    examples = data.draw(st.lists(st.lists(VALUES, min_size=6, max_size=6), max_size=7))
    more = data.draw(st.lists(VALUES, min_size=6, max_size=6))
    neighbour = data.draw(st.permutations([*examples, more]))
    repeat = data.draw(
        st.sampled_from([1, 1, 500])
    )  # a long gradient: the rounding of many coordinates adds up

    def total(rows: list[list[float]]) -> torch.Tensor:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
        chunks = [
            rows[start:end] for start, end in zip([0, *cuts], [*cuts, len(rows)], strict=True)
        ]
        tensors = [
            torch.tensor(chunk, dtype=torch.float64).view(-1, 6).to(dtype).repeat(1, repeat)
            for chunk in chunks
        ]
        sums = noisy_sums(
            [[part[:, :2].unsqueeze(2), part[:, 2:]] for part in tensors],
            [(2, 1), (6 * repeat - 2,)],
            source=quiet_source(),
        )
        return torch.cat([part.flatten() for part in sums])

    moved = float((total(examples) - total(neighbour)).norm())
    assert moved <= 0.3 * (1 + 1e-6)
