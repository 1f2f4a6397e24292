"""What `planning/simulate.py` says of a long run beside real ones: two ranks distil, and are killed at the moments that it draws.

python benchmarks/goodput.py            # ten minutes; writes goodput-PROCESSOR.md
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import shapes
import torch

from post_dist.bench.timing import device_name, slug
from post_dist.planning.simulation import Run, simulate

HERE = Path(__file__).resolve().parent
RANKS = 2
STEPS = 500
INTERVALS = (10, 40, 120)
SEEDS = (0, 1)
SECONDS_BETWEEN_FAILURES = 15.0
PORTS = itertools.count(29800)
_LOOKS = 0.02


class RealRun:
    """A distillation that is started again whenever it is killed, until it is done."""

    def __init__(self, run: Path, output: Path, interval: int) -> None:
        settings = (
            "--set=distill.batch_size=4",
            f"--set=distill.checkpoint_every_steps={interval}",
            f"--set=distill.steps={STEPS}",
            f"--output={output}",
        )
        self._command = [sys.executable, "-m", "post_dist", "distill", str(run), *settings]
        self._output = output

    def lines(self) -> list[dict[str, Any]]:
        """What the metrics file says so far, of all starts."""
        return [
            json.loads(line)
            for path in self._output.glob("*/distill-*/metrics.jsonl")
            for line in path.read_text().splitlines()
        ]

    def _start(self) -> list[subprocess.Popen[bytes]]:
        """Each rank by itself, so that no launcher is left when they are killed."""
        world = {
            "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(next(PORTS)),
        }
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        own = [
            os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            for rank in range(RANKS)
        ]
        return [subprocess.Popen(self._command, env=each, **quiet) for each in own]

    def finish(self, gaps: list[float], step: float) -> dict[str, Any]:
        """Run to the end. A kill comes so many seconds after the first step that follows the one before.

        Returns:
            `seconds` from the beginning of the first step to the end of the last; `restarts`, each from a kill to the beginning of the
            next step; `lost_steps`, done again.
        """
        restarts: list[float] = []
        began = killed = 0.0
        for gap in [*gaps, float("inf")]:
            before = len(self.lines())
            ranks = self._start()
            while len(self.lines()) == before:
                time.sleep(_LOOKS)
            moving = time.monotonic() - step
            if killed:
                restarts.append(moving - killed)
            began = began or moving
            while time.monotonic() < moving + gap and self.lines()[-1]["step"] + 1 < STEPS:
                time.sleep(_LOOKS)
            ended = time.monotonic()
            if self.lines()[-1]["step"] + 1 == STEPS:
                break
            killed = ended
            for rank in ranks:
                rank.kill()
                rank.wait()
        if any(rank.wait() for rank in ranks):
            raise SystemExit("a run that was not killed has failed")
        return {
            "seconds": ended - began,
            "restarts": restarts,
            "lost_steps": len(self.lines()) - STEPS,
        }


def main() -> None:
    """Measure the step and the save on a run that is left alone, then compare."""
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    rows, restarts = [], []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        run = shapes.write_run(place, width=128, layers=4, vocabulary=2000)
        alone = RealRun(run, place / "alone", INTERVALS[0])
        alone.finish([], 0.0)
        times = [line["seconds"] for line in alone.lines()]
        taken = {
            number: after - before
            for number, (before, after) in enumerate(itertools.pairwise(times), start=1)
        }
        # What a save takes is in the time of the step after it.
        step = statistics.median(
            seconds for number, seconds in taken.items() if number % INTERVALS[0]
        )
        save = (
            statistics.median(
                seconds for number, seconds in taken.items() if number % INTERVALS[0] == 0
            )
            - step
        )
        for interval in INTERVALS:
            for seed in SEEDS:
                gaps = (
                    np.random.default_rng(seed).exponential(SECONDS_BETWEEN_FAILURES, 100).tolist()
                )  # as the simulation draws them
                found = RealRun(run, place / f"{interval}-{seed}", interval).finish(gaps, step)
                restarts += found["restarts"]
                rows.append({"interval": interval, "seed": seed, **found})
                print(rows[-1], flush=True)
    restart = statistics.mean(restarts)
    sizes: dict[str, Any] = {
        "step": step,
        "ranks": 1,
        "steps": STEPS,
        "save": save,
        "restart": restart,
    }
    for row in rows:
        said = simulate(
            Run(
                **sizes,
                interval=row["interval"],
                hours_between_failures=SECONDS_BETWEEN_FAILURES / 3600,
            ),
            row["seed"],
        )
        row |= {
            "said_seconds": said.seconds,
            "said_failures": said.failures,
            "said_lost_steps": said.lost_steps,
        }
    write(rows, sizes)


def write(rows: list[dict[str, Any]], sizes: dict[str, Any]) -> None:
    """The table."""
    device = device_name(torch.device("cpu"))
    apart = [abs(row["said_seconds"] / row["seconds"] - 1) for row in rows]
    text = f"""# A long run with failures: simulated, and real

`python benchmarks/goodput.py` on {device}: {STEPS} steps of distillation on {RANKS} ranks, all killed
(SIGKILL) at moments that the simulation draws too, {SECONDS_BETWEEN_FAILURES:g} s apart in the mean, and started again. A step takes
{sizes["step"]:.4f} s, a save {sizes["save"]:.3f} s, both measured on a run that was left alone; from a
kill to the next step, {sizes["restart"]:.1f} s in the mean.

| steps between saves | draw | failures, real | simulated | steps lost | simulated | seconds | simulated | apart |
|---|---|---|---|---|---|---|---|---|
"""
    for row, off in zip(rows, apart, strict=True):
        text += (
            f"| {row['interval']} | {row['seed']} | {len(row['restarts'])} | {row['said_failures']} | {row['lost_steps']} "
            f"| {row['said_lost_steps']} | {row['seconds']:.1f} | {row['said_seconds']:.1f} | {off:.1%} |\n"
        )
    text += f"\nSeconds are apart by {statistics.median(apart):.1%} in the median and {max(apart):.1%} at most.\n"
    (HERE / f"goodput-{slug(device)}.md").write_text(text)


if __name__ == "__main__":
    main()
