"""Simulate a long run on thousands of GPUs: uneven steps, failures, checkpoints and restarts.

A step ends with its slowest rank. A failure undoes all steps since the last checkpoint. It also
costs the time to notice it, to wait in the queue again and to load the checkpoint. Goodput is the
fraction of the time that was spent on steps that were kept.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import ndtri

GPU_HOURS_BETWEEN_FAILURES = 50_700.0
"""419 unexpected interruptions in 54 days of 16,384 H100 (Llama 3, arXiv 2407.21783, 3.3.4)."""
_RESTART_SECONDS = 600.0
"""Time from a failure to the next step: to notice it, to wait in the queue, to load the state."""
_JITTER = 0.02
"""Standard deviation of a GPU's step time, divided by its mean."""
_DRAWS = 10
"""Simulated runs of a plan."""
_STRAGGLER = 1.2
"""Slowdown of the slow GPU in `goodput_with_a_gpu_1.2_times_as_slow`."""
STORAGE_GB_PER_SECOND = 2.0
"""Rate in GB/s of the shared folder that checkpoints are written to."""
_HOPELESS = 10
"""The simulation gives up after this many times the duration of the steps: the run saves too rarely
to finish."""
_QUANTILES = 1000
"""Quantiles of a step's time that its mean is taken of."""
_CANDIDATES = 24
"""Intervals that `best_interval` tries, each the one before divided by the square root of 2."""


@dataclass(frozen=True)
class Run:
    """A run to be simulated. Times are in seconds.

    Attributes:
        step: mean duration of a rank's step.
        ranks: number of ranks, one for each GPU.
        steps: number of steps.
        save: time that all ranks wait for a checkpoint.
        interval: steps between two checkpoints.
        restart: time from a failure to the first step that is repeated.
        hours_between_failures: mean GPU-hours between failures; infinite for no failures.
        jitter: standard deviation of a rank's step time, divided by its mean.
        straggler: slowdown of one slow rank; 1 for no straggler.
    """

    step: float
    ranks: int
    steps: int
    save: float
    interval: int
    restart: float
    hours_between_failures: float
    jitter: float = 0.0
    straggler: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """The outcome of one simulated run.

    Attributes:
        seconds: time from the beginning to the end.
        goodput: fraction of this time in steps that were kept, each counted at `Run.step`.
        failures: number of failures.
        lost_steps: number of steps that were repeated.
    """

    seconds: float
    goodput: float
    failures: int
    lost_steps: int


def simulate(run: Run, seed: int) -> Outcome:
    """Simulate a run once, with random numbers from a seed.

    Failures are drawn. Between two of them each step counts with its mean time, so a run costs as
    much as it has failures, however many steps it has.
    """
    source = np.random.default_rng(seed)
    mean_between = run.hours_between_failures * 3600 / run.ranks
    step = run.step * _mean_of_slowest(run)
    period = run.interval * step + run.save
    clock = 0.0
    done = 0
    failures = 0
    lost = 0
    while clock <= _HOPELESS * run.steps * run.step:
        left = run.steps - done
        # The last step of a run needs no checkpoint.
        end = clock + left * step + (left - 1) // run.interval * run.save
        failure = np.inf
        if np.isfinite(mean_between):
            failure = clock + source.exponential(mean_between)
        if end <= failure:
            return Outcome(end, run.steps * run.step / end, failures, lost)

        # The failure undoes the steps since the last checkpoint. A step that had ended when the
        # failure came during its checkpoint is lost too.
        saved, since = divmod(failure - clock, period)
        done += int(saved) * run.interval
        lost += min(run.interval, int(since // step))
        failures += 1
        clock = failure + run.restart
    return Outcome(clock, 0.0, failures, lost)


def _mean_of_slowest(run: Run) -> float:
    """Return the mean time of the slowest rank at a step, divided by `Run.step`.

    The largest of W normal values is the normal quantile of U^(1/W), where U is uniform.
    """
    middles = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    slowest = np.maximum(0.0, 1 + run.jitter * ndtri(middles ** (1 / run.ranks)))
    if run.straggler == 1:
        return float(slowest.mean())
    own = run.straggler * (1 + run.jitter * ndtri(middles))
    return float(np.maximum.outer(slowest, own).mean())


def mean_goodput(run: Run, draws: int = _DRAWS) -> float:
    """Return the mean goodput over several seeds."""
    return float(np.mean([simulate(run, seed).goodput for seed in range(draws)]))


def best_interval(run: Run) -> tuple[int, float]:
    """Find the number of steps between checkpoints that gives the greatest mean goodput.

    All candidates meet the same failures.

    Returns:
        The interval, and its mean goodput.
    """
    steps_between_failures = run.hours_between_failures * 3600 / run.ranks / run.step
    # An interval longer than two mean times between failures hardly ever ends.
    longest = min(run.steps, 2 * steps_between_failures)
    candidates = {max(1, round(longest / 2 ** (power / 2))) for power in range(_CANDIDATES)}
    goodputs = {}
    for interval in sorted(candidates):
        goodputs[interval] = mean_goodput(replace(run, interval=interval))
    best = max(goodputs, key=lambda interval: goodputs[interval])
    return best, goodputs[best]


def goodput(stage: dict[str, Any]) -> dict[str, float]:
    """Simulate the planned distillation as a long run, at the best interval between checkpoints.

    Args:
        stage: the plan of distillation.

    Returns:
        The goodput, the goodput with one slow GPU, the restarts, the days with failures and
        checkpoints, and the assumptions.
    """
    save = stage["checkpoint_gib"] * 2**30 / (STORAGE_GB_PER_SECOND * 1e9)
    run = Run(
        step=stage["step_seconds"],
        ranks=stage["gpus"],
        steps=stage["steps"],
        save=save,
        interval=1,
        restart=_RESTART_SECONDS,
        hours_between_failures=GPU_HOURS_BETWEEN_FAILURES,
        jitter=_JITTER,
    )
    # If few of the simulated runs have a failure, it would look best never to save. Young's
    # interval does not depend on the simulated failures.
    young = round(young_interval(save, run.ranks) / run.step)
    interval = min(best_interval(run)[0], max(1, young))
    chosen = replace(run, interval=interval)
    outcomes = [simulate(chosen, seed) for seed in range(_DRAWS)]
    return {
        "goodput": float(np.mean([outcome.goodput for outcome in outcomes])),
        "restarts": float(np.mean([outcome.failures for outcome in outcomes])),
        "days": float(np.mean([outcome.seconds for outcome in outcomes])) / 86400,
        "checkpoint_every_steps": interval,
        "jitter": _JITTER,
        "restart_seconds": _RESTART_SECONDS,
        f"goodput_with_a_gpu_{_STRAGGLER:g}_times_as_slow": mean_goodput(
            replace(chosen, straggler=_STRAGGLER)
        ),
    }


def young_interval(save_seconds: float, ranks: int) -> float:
    """Compute the interval in seconds at which checkpoints and repeated steps together cost least.

    This is sqrt(2 x time of a save x time between failures) (Young 1974).
    """
    seconds_between_failures = GPU_HOURS_BETWEEN_FAILURES / ranks * 3600
    return math.sqrt(2 * save_seconds * seconds_between_failures)
