"""Compare `planning/simulation.py` with real runs that are killed and started again.

    python benchmarks/goodput.py

Two ranks distill a small model. All ranks are killed at the moments that the simulation draws, and
started again, until the run is done. It takes ten minutes on two cores and writes
goodput-PROCESSOR.md.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import shapes
from markdown_table import markdown_table
from processor import CPU, ONE_THREAD, results_file

from post_dist.bench.timing import device_name
from post_dist.planning.simulation import Outcome, Run, simulate

RANKS = 2
STEPS = 500
INTERVALS = (10, 40, 120)
"""Steps between checkpoints."""
SEEDS = (0, 1)
SECONDS_BETWEEN_FAILURES = 15.0
_MOST_FAILURES = 100
_PORTS = itertools.count(29800)
"""A start has a port of its own: the last start's may still be taken for a while."""
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class MeasuredRun:
    """What became of a run.

    Attributes:
        seconds: from the beginning of the first step to the end of the last.
        restarts: seconds from each kill to the beginning of the next step.
        lost_steps: steps that were taken again.
    """

    seconds: float
    restarts: list[float]
    lost_steps: int


class RestartedRun:
    """A run of distill that is started again whenever it is killed.

    Args:
        run: the run file.
        output: folder of this run.
        interval: steps between checkpoints.
        steps: steps of the run.
    """

    def __init__(self, run: Path, output: Path, interval: int, steps: int) -> None:
        self._command = [
            *(sys.executable, "-m", "post_dist", "distill", str(run)),
            "--set=distill.batch_size=4",
            f"--set=distill.checkpoint_every_steps={interval}",
            f"--set=distill.steps={steps}",
            f"--output={output}",
        ]
        self._output = output
        self._steps = steps

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of the metrics file so far, those of all starts."""
        lines = []
        for path in self._output.glob("*/distill-*/metrics.jsonl"):
            lines += [json.loads(line) for line in path.read_text().splitlines()]
        return lines

    def finish(self, gaps: list[float], step_seconds: float) -> MeasuredRun:
        """Run to the end.

        Args:
            gaps: seconds from the first step of each start to the next kill. After the last of
                them, the run is not killed again.
            step_seconds: time of a step; the metrics file shows when a step has ended.
        """
        restarts = []
        first_step_began = None
        killed = None
        for gap in [*gaps, float("inf")]:
            # A start counts as running from the beginning of its first step, which the metrics file
            # shows only at that step's end.
            lines_before = len(self.metrics())
            ranks = self._start_ranks()
            self._wait_for_line(lines_before + 1)
            began = time.monotonic() - step_seconds
            if first_step_began is None:
                first_step_began = began
            if killed is not None:
                restarts.append(began - killed)

            # The last gap is infinite, so that the run ends even if no failure is left.
            self._wait_for_end(began + gap)
            ended = time.monotonic()
            if self._is_finished():
                break
            killed = ended
            for rank in ranks:
                rank.kill()
                rank.wait()
        # The list waits for every rank before any code is judged.
        if any([rank.wait() != 0 for rank in ranks]):
            raise SystemExit("a run that was not killed has failed")
        return MeasuredRun(
            seconds=ended - first_step_began,
            restarts=restarts,
            lost_steps=len(self.metrics()) - self._steps,
        )

    def _start_ranks(self) -> list[subprocess.Popen[bytes]]:
        """Start each rank by itself, so that no launcher is left when the ranks are killed."""
        world = {
            "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(next(_PORTS)),
        }
        ranks = []
        for rank in range(RANKS):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(
                subprocess.Popen(
                    self._command,
                    env=os.environ | ONE_THREAD | world | own,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
        return ranks

    def _wait_for_line(self, number: int) -> None:
        """Wait until the metrics file has this many lines."""
        while len(self.metrics()) < number:
            time.sleep(_POLL_SECONDS)

    def _wait_for_end(self, deadline: float) -> None:
        """Wait until the last step has ended, or until a moment of the monotonic clock."""
        while not self._is_finished() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def _is_finished(self) -> bool:
        return bool(self.metrics()[-1]["step"] + 1 == self._steps)


@dataclass(frozen=True)
class Comparison:
    """A real run and its simulation."""

    interval: int
    seed: int
    real: MeasuredRun
    simulated: Outcome

    @property
    def difference(self) -> float:
        """Relative difference of the seconds."""
        return abs(self.simulated.seconds / self.real.seconds - 1)


def measure_step_and_save(lines: list[dict[str, Any]], interval: int) -> tuple[float, float]:
    """Return the seconds of a step and of a checkpoint, from a run that was not killed.

    Args:
        lines: lines of the run's metrics file.
        interval: steps between its checkpoints.
    """
    plain_steps = []
    steps_after_save = []
    for number, (before, after) in enumerate(itertools.pairwise(lines), start=1):
        seconds = after["seconds"] - before["seconds"]
        # The time of a save is part of the time of the step after it.
        if number % interval == 0:
            steps_after_save.append(seconds)
        else:
            plain_steps.append(seconds)
    step = statistics.median(plain_steps)
    return step, statistics.median(steps_after_save) - step


def main() -> None:
    """Measure a step and a save on an undisturbed run, then compare runs with failures."""
    # A step and a save are timed on a run without failures. All runs share one small model.
    real_runs = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run = shapes.write_run(folder, width=128, layers=4, vocabulary=2000)
        undisturbed = RestartedRun(run, folder / "undisturbed", INTERVALS[0], STEPS)
        undisturbed.finish([], 0.0)
        step, save = measure_step_and_save(undisturbed.metrics(), INTERVALS[0])
        # Runs with failures.
        for interval, seed in itertools.product(INTERVALS, SEEDS):
            # The simulation draws its failures with the same generator.
            source = np.random.default_rng(seed)
            gaps = source.exponential(SECONDS_BETWEEN_FAILURES, _MOST_FAILURES).tolist()
            restarted = RestartedRun(run, folder / f"{interval}-{seed}", interval, STEPS)
            real_runs[interval, seed] = restarted.finish(gaps, step)
            print(interval, seed, real_runs[interval, seed], flush=True)

    # One rank is simulated, because both real ranks are killed together and so fail as one. A
    # restart takes as long as the real ones did on average.
    restarts = [seconds for real in real_runs.values() for seconds in real.restarts]
    simulated_run = Run(
        step=step,
        ranks=1,
        steps=STEPS,
        save=save,
        interval=1,
        restart=statistics.mean(restarts),
        hours_between_failures=SECONDS_BETWEEN_FAILURES / 3600,
    )
    # The same seeds draw the same failures in both.
    comparisons = []
    for (interval, seed), real in real_runs.items():
        simulated = simulate(replace(simulated_run, interval=interval), seed)
        comparisons.append(Comparison(interval, seed, real, simulated))
    write_table(comparisons, simulated_run)


def write_table(comparisons: list[Comparison], simulated_run: Run) -> None:
    """Write the comparison in Markdown.

    Args:
        comparisons: real runs and their simulations.
        simulated_run: what was simulated, but for the interval.
    """
    # Real and simulated numbers stand side by side, so a head may appear twice.
    heads = (
        *("steps between saves", "draw", "failures, real", "simulated"),
        *("steps lost", "simulated", "seconds", "simulated", "difference"),
    )
    rows = []
    for each in comparisons:
        rows.append(
            (
                each.interval,
                each.seed,
                len(each.real.restarts),
                each.simulated.failures,
                each.real.lost_steps,
                each.simulated.lost_steps,
                f"{each.real.seconds:.1f}",
                f"{each.simulated.seconds:.1f}",
                f"{each.difference:.1%}",
            )
        )
    differences = [each.difference for each in comparisons]
    text = f"""# A long run with failures: simulated and real

`python benchmarks/goodput.py` made this on {device_name(CPU)}. Two ranks run {STEPS} steps of \
distillation. All ranks are killed (SIGKILL) at the
moments that the simulation draws too, {SECONDS_BETWEEN_FAILURES:g} s apart on average, and \
started again. A step takes {simulated_run.step:.4f} s and a save {simulated_run.save:.3f} s, both
measured on an undisturbed run. From a kill to the next step it takes {simulated_run.restart:.1f} \
s on average.

{markdown_table(heads, rows)}
The seconds differ by {statistics.median(differences):.1%} in the median and \
{max(differences):.1%} at most.
"""
    results_file("goodput", ".md").write_text(text)


if __name__ == "__main__":
    main()
