"""What no one here can rent: a long run on thousands of GPUs, with uneven steps, failures, saving and queueing again.

A step ends with its slowest rank. A failure takes back all steps since the last checkpoint, and costs the time to notice it, to be
queued again and to load. Goodput is the share of the time that went into steps which were kept.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import ndtri

GPU_HOURS_BETWEEN_FAILURES = 50_700.0
"""419 unexpected interruptions in 54 days of 16,384 H100 (Llama 3, arXiv 2407.21783, section 3.3.4)."""
_RESTART_SECONDS = 600.0
"""From a failure to the first step again: noticed, queued, loaded."""
_JITTER = 0.02
"""Standard deviation of a GPU's step over its mean."""
_STRAGGLER = 1.2
STORAGE_GB_PER_SECOND = 2.0
"""Of the shared folder that checkpoints go to."""
_HOPELESS = 10
"""A run that takes so many times as long as its steps has checkpoints too far apart to come to an end."""


@dataclass(frozen=True)
class Run:
    """A run to be simulated; times in seconds.

    Attributes:
        step: of a rank by itself.
        ranks: one a GPU.
        steps: how many.
        save: how long all ranks stand still for a checkpoint.
        interval: steps between two.
        restart: from a failure to the first step that is done again.
        hours_between_failures: GPU-hours; infinite for none.
        jitter: standard deviation of a rank's step over its mean.
        straggler: how many times as long one rank takes; 1 for none.
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
    """What became of it.

    Attributes:
        seconds: from beginning to end.
        goodput: the share of them in steps that were kept, each counted at `Run.step`.
        failures: how many there were.
        lost_steps: done again.
    """

    seconds: float
    goodput: float
    failures: int
    lost_steps: int


def simulate(run: Run, seed: int) -> Outcome:
    """One run, drawn from a seed."""
    source = np.random.default_rng(seed)
    mean_between = run.hours_between_failures * 3600 / run.ranks
    clock, done, failures, lost = 0.0, 0, 0, 0
    next_failure = source.exponential(mean_between) if np.isfinite(mean_between) else np.inf
    while done < run.steps:
        # So many steps as may end before the failure, in whole intervals; what is drawn beyond it is of no use.
        until = min(run.steps - done, (next_failure - clock) / run.step + 1)
        count = min(run.steps - done, run.interval * -(-int(until) // run.interval))
        saves = (np.arange(1, count + 1) % run.interval == 0) & (
            np.arange(1, count + 1) < run.steps - done
        )
        saved = clock + np.cumsum(_step_seconds(run, count, source) + run.save * saves)
        if saved[-1] <= next_failure:
            clock, done = float(saved[-1]), done + count
            continue
        survived = int((saved <= next_failure).sum())
        kept = survived // run.interval * run.interval
        ended = survived + int(saved[survived] - run.save * saves[survived] <= next_failure)
        done, failures, lost = done + kept, failures + 1, lost + ended - kept
        clock = next_failure + run.restart
        next_failure = clock + source.exponential(mean_between)
        if clock > _HOPELESS * run.steps * run.step:
            return Outcome(clock, 0.0, failures, lost)
    return Outcome(clock, run.steps * run.step / clock, failures, lost)


def _step_seconds(run: Run, count: int, source: np.random.Generator) -> np.ndarray:
    """The slowest of the ranks at each of some steps.

    The largest of W normal values is the normal quantile of U^(1/W), which needs one draw however many ranks there are.
    """
    slowest = ndtri(source.random(count) ** (1 / run.ranks)) if run.jitter else np.zeros(count)
    of_all = np.maximum(0.0, 1 + run.jitter * slowest)
    of_straggler = (
        run.straggler * (1 + run.jitter * source.standard_normal(count))
        if run.straggler > 1
        else 0.0
    )
    seconds: np.ndarray = run.step * np.maximum(of_all, of_straggler)
    return seconds


def mean_goodput(run: Run, draws: int = 10) -> float:
    """Over several seeds."""
    return float(np.mean([simulate(run, seed).goodput for seed in range(draws)]))


def best_interval(run: Run) -> tuple[int, float]:
    """The number of steps between checkpoints with the greatest mean goodput, and that goodput; all are tried on the same failures."""
    longest = min(
        run.steps, 2 * run.hours_between_failures * 3600 / run.ranks / run.step
    )  # beyond it, few stretches ever end
    candidates = sorted({max(1, round(longest / 2 ** (power / 2))) for power in range(24)})
    goodputs = {interval: mean_goodput(replace(run, interval=interval)) for interval in candidates}
    best = max(goodputs, key=lambda interval: goodputs[interval])
    return best, goodputs[best]


def goodput(stage: dict[str, Any]) -> dict[str, float]:
    """Of the planned distillation as a long run: with uneven steps and failures, at the best interval, and with one slow GPU."""
    save = stage["checkpoint_gib"] * 2**30 / (STORAGE_GB_PER_SECOND * 1e9)
    sizes: dict[str, Any] = {
        "step": stage["step_seconds"],
        "ranks": stage["gpus"],
        "steps": stage["steps"],
        "save": save,
    }
    run = Run(
        **sizes,
        interval=1,
        restart=_RESTART_SECONDS,
        hours_between_failures=GPU_HOURS_BETWEEN_FAILURES,
        jitter=_JITTER,
    )
    # Where few of the drawn runs meet a failure, not to save at all would look best; Young's interval knows what is rare.
    interval = min(
        best_interval(run)[0],
        max(1, round(young_interval(save, stage["gpus"]) / stage["step_seconds"])),
    )
    best, slow = (
        mean_goodput(replace(run, interval=interval, straggler=straggler))
        for straggler in (1.0, _STRAGGLER)
    )
    return {
        "goodput": best,
        "checkpoint_every_steps": interval,
        "jitter": _JITTER,
        "restart_seconds": _RESTART_SECONDS,
        f"goodput_with_a_gpu_{_STRAGGLER:g}_times_as_slow": slow,
    }


def young_interval(save_seconds: float, ranks: int) -> float:
    """How often to save, so that saving and what failures undo cost least together: sqrt(2 x save x time between failures) (Young 1974)."""
    return math.sqrt(2 * save_seconds * GPU_HOURS_BETWEEN_FAILURES / ranks * 3600)
