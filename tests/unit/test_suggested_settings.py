"""The settings that a private run gets for a number of gradients."""

import pytest

from post_dist.privacy.suggested_settings import suggested_plan


def divided(adapter: str, gradients: float, examples: float) -> tuple[float, float]:
    """Return batch size and steps."""
    found = suggested_plan(adapter, gradients, examples)
    return found["privacy.expected_batch_size"], found["privacy.steps"]


@pytest.mark.parametrize(
    ("gradients", "wanted"),
    [(5_120, (64, 80)), (20_480, (169, 121)), (102_400, (521, 197))],
)
def test_the_rule_gives_the_plans_that_it_comes_from(
    gradients: float, wanted: tuple[int, int]
) -> None:
    assert divided("prompt", gradients, 6_500) == wanted


@pytest.mark.parametrize("adapter", ["prompt", "lora", "head"])
@pytest.mark.parametrize("examples", [50, 6_500, 10**6])
@pytest.mark.parametrize("gradients", [320, 5_000, 10**6, 10**8])
def test_no_plan_takes_more_than_there_is_time_for(
    adapter: str, examples: float, gradients: float
) -> None:
    batch_size, steps = divided(adapter, gradients, examples)
    assert batch_size >= 1
    assert batch_size <= max(1, 0.26 * examples)
    # A batch of a head holds one example at least, and there are always 400 of them.
    assert batch_size * steps <= max(1.1 * gradients, 400)
