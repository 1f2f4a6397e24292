"""Random sequences of runs, kills and resumes on one ledger never spend more than its cap."""

import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from privacy.checks import plan_of
from privacy.ledger_checks import open_ledger
from scipy import stats
from scipy.signal import fftconvolve

from post_dist.errors import PrivacyRefused
from post_dist.privacy import accounting, budget, ledger
from post_dist.privacy.plan import PrivacyPlan

PLANS = [
    plan_of(steps=4),
    plan_of(steps=3, noise_multiplier=1.5, sampling_probability=0.1),
    plan_of(steps=2, noise_multiplier=2.0, delta=1e-2),
]

# Losses are rounded to the lower multiple of this, so that delta is never overestimated.
GRID = 0.02
LOSSES = np.arange(-3000, 3001) * GRID

Steps = tuple[tuple[tuple[float, float], int], ...]
"""Number of steps by (noise multiplier, sampling probability)."""


def spent_steps(path: Path) -> Steps:
    """Count the steps of a ledger, from its lines alone.

    k sums of one step tell as much as one sum with noise / sqrt(k).
    """
    plans = {}
    sums: Counter = Counter()
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["row"] == "opened":
            plans[row["run"]] = row["plan"]
        elif row["row"] == "step":
            sums[row["run"], row["trial"], row["step"]] += 1
    steps: Counter = Counter()
    for (run, _, _), times in sums.items():
        plan = plans[run]
        steps[plan["noise_multiplier"] / times**0.5, plan["sampling_probability"]] += 1
    return tuple(sorted(steps.items()))


@cache
def least_epsilon(steps: Steps, delta: float) -> float:
    """Return a lower bound on epsilon at delta, by adding up losses on a grid.

    The neighbor with one example less is the one that is harder to tell apart for these plans, so
    one direction gives a lower bound.
    """
    total = (LOSSES == 0).astype(float)
    for (noise, probability), count in steps:
        for _ in range(count):
            total = fftconvolve(total, step_losses(noise, probability), mode="same").clip(0)
    low, high = 0.0, float(LOSSES[-1])
    while high - low > 1e-3:
        epsilon = (low + high) / 2
        beyond = epsilon < LOSSES
        reached = (total[beyond] * -np.expm1(epsilon - LOSSES[beyond])).sum()
        low, high = (epsilon, high) if reached > delta else (low, epsilon)
    return low


@cache
def step_losses(noise: float, probability: float) -> np.ndarray:
    """Return the distribution on the grid of a step's privacy loss, rounded toward less loss."""
    x = np.linspace(-12 * noise, 1 + 12 * noise, 400_001)
    without = stats.norm.pdf(x, 0, noise)
    with_one = (1 - probability) * without + probability * stats.norm.pdf(x, 1, noise)
    loss = np.log1p(probability * np.expm1((2 * x - 1) / (2 * noise**2)))
    places = np.floor(loss / GRID).astype(int).clip(-3000, 3000) + 3000
    weights = with_one * (x[1] - x[0])
    found = np.bincount(places, weights=weights, minlength=len(LOSSES))
    return found / max(1.0, found.sum())


@pytest.fixture(autouse=True)
def quick_accounting() -> Iterator[None]:
    """Account on a coarse grid, which only raises epsilon, and remember each sum."""
    known: dict[tuple, float] = {}
    real = accounting.composed_epsilon

    def composed(plans: list[PrivacyPlan], delta: float) -> float:
        key = (tuple(sorted(Counter(plans).items(), key=repr)), delta)
        if key not in known:
            known[key] = real(plans, delta)
        return known[key]

    with (
        mock.patch.object(accounting, "FINE", 0.02),
        mock.patch.object(ledger, "composed_epsilon", composed),
        mock.patch.object(budget, "composed_epsilon", composed),
    ):
        yield


def play(place: Path, chance: random.Random) -> Counter:
    """Run, kill and resume on a ledger at random; return how often what happened."""
    path = place / "ledger.jsonl"
    cap = chance.choice([3.0, 5.0, 8.0])
    happened: Counter = Counter()
    # By name, each run's plan and the commitments of its steps.
    runs: dict[str, tuple[PrivacyPlan, list[str]]] = {}
    for number in range(chance.randrange(2, 8)):
        again = [name for name, (plan, sums) in runs.items() if len(sums) <= plan.steps]
        name = chance.choice([*again, f"run-{number}"])
        plan, sums = runs.setdefault(name, (chance.choice(PLANS), []))
        begun = path.exists() and path.stat().st_size > 0
        given = chance.choice([cap, cap, None, cap + 1]) if begun else cap
        try:
            with open_ledger(place) as opened:
                run = ledger.LedgerRun(opened, name, plan, given)
                # A run that resumes repeats its last step, with the same sum or another one.
                first = max(0, len(sums) - chance.randrange(2))
                for step in range(first, min(plan.steps, first + chance.randrange(4))):
                    commitment = sums[step] if step < len(sums) else ""
                    if not commitment or chance.random() < 0.5:
                        commitment = f"{number} {chance.random()}"
                    run.intend(0, step, commitment)
                    sums[step:] = [commitment]
                    happened["steps"] += 1
        except PrivacyRefused as error:
            happened["refused for its cap" if "but privacy." in str(error) else "refused"] += 1
        steps = spent_steps(path)
        if not steps:
            continue
        # The cap is meant at the delta of the run that has set it.
        delta = json.loads(path.read_text().splitlines()[0])["delta"]
        spent = least_epsilon(steps, delta)
        assert spent <= cap, f"spent {spent}, above the cap {cap}"
        stated = budget.budget_of(path, delta)["epsilon"]
        assert stated >= spent - 1e-6, f"the budget says {stated}, but {spent} was spent"
        planned = {plan.noise_multiplier for plan in PLANS}
        happened["repeated"] += any(noise not in planned for (noise, _), _ in steps)
    return happened


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sequences", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_sequence_passes_the_cap(tmp_path: Path, sequences: int) -> None:
    happened: Counter = Counter()
    for number in range(sequences):
        place = tmp_path / str(number)
        place.mkdir()
        happened += play(place, random.Random(number))
    # The sequences reach what they are about.
    for kind in ("steps", "repeated", "refused", "refused for its cap"):
        assert happened[kind] > sequences / 10, happened
    assert math.isclose(least_epsilon((((1.0, 1.0), 1),), 1e-5), 4.377, abs_tol=0.05), (
        "q = 1, sigma = 1"
    )
