"""The simulator where the answer is known by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from post_dist.planning.simulation import Run, best_interval, mean_goodput, simulate, young_interval

CALM = Run(
    step=2.0,
    ranks=64,
    steps=1000,
    save=3.0,
    interval=100,
    restart=60.0,
    hours_between_failures=math.inf,
)


def test_without_failures_only_saving_costs() -> None:
    outcome = simulate(CALM, 0)
    assert outcome.seconds == pytest.approx(1000 * 2 + 9 * 3)
    assert outcome.goodput == pytest.approx(2000 / 2027)
    assert (outcome.failures, outcome.lost_steps) == (0, 0)


@pytest.mark.parametrize("ranks", [1, 8, 1024, 16384])
def test_a_step_ends_with_the_slowest_rank(ranks: int) -> None:
    uneven = replace(CALM, ranks=ranks, jitter=0.05, save=0.0, steps=20_000, interval=20_000)
    slowest = np.random.default_rng(1).standard_normal((2000, min(ranks, 1024))).max(axis=1).mean()
    if ranks == 16384:
        # The expected largest of 16,384 normal values, by numerical integration of its density.
        slowest = 3.966
    assert simulate(uneven, 0).seconds / 20_000 == pytest.approx(
        2 * (1 + 0.05 * slowest), rel=0.005
    )


def test_one_straggler_slows_all() -> None:
    assert simulate(replace(CALM, straggler=1.3), 0).seconds == pytest.approx(
        1000 * 2 * 1.3 + 9 * 3
    )


def test_failures_come_as_often_as_they_should_and_cost_what_they_should() -> None:
    run = replace(CALM, steps=200_000, hours_between_failures=64.0, interval=50)  # one an hour
    outcome = simulate(run, 0)
    busy = outcome.seconds - outcome.failures * run.restart
    assert outcome.failures == pytest.approx(busy / 3600, rel=0.25)
    assert outcome.lost_steps / outcome.failures == pytest.approx(25, rel=0.2), (
        "half an interval each"
    )
    assert outcome.seconds == pytest.approx(
        (200_000 + outcome.lost_steps) * 2 + (200_000 / 50) * 3 + outcome.failures * 61, rel=0.01
    ), "every second is a step, a checkpoint, or a restart"


@pytest.mark.parametrize("ranks", [4096, 16384])
def test_the_best_interval_is_young_s(ranks: int) -> None:
    run = replace(CALM, ranks=ranks, steps=200_000, save=10.0, hours_between_failures=50_700.0)
    interval, goodput = best_interval(run)
    young = young_interval(10.0, ranks) / 2.0
    assert young / 2.5 < interval < 2.5 * young
    assert goodput == pytest.approx(mean_goodput(replace(run, interval=round(young))), abs=3e-3)
    assert mean_goodput(replace(run, interval=round(young / 20))) < goodput


def test_checkpoints_that_are_too_far_apart_never_end() -> None:
    assert (
        simulate(
            replace(
                CALM, steps=100_000, interval=100_000, ranks=16384, hours_between_failures=50_700.0
            ),
            0,
        ).goodput
        == 0
    )


def test_a_run_costs_as_much_as_it_has_failures_however_many_steps_it_has() -> None:
    long = replace(CALM, step=0.1, steps=10**12, hours_between_failures=1e7, interval=10**7)
    outcome = simulate(long, 0)
    assert outcome.failures == pytest.approx(1e11 / (1e7 * 3600 / 64), rel=0.3)
    assert outcome.seconds == pytest.approx(1e11, rel=0.01)
