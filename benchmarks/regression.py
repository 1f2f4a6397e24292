"""Compare our speed over each stage's baseline with the ratios committed for this processor.

    make bench
    python benchmarks/regression.py            # compares; exits with 1 if a ratio fell too far
    python benchmarks/regression.py --write    # replaces the committed ratios

The program runs `post-dist bench` for distill, tune and transfer on a model with random weights.
The teacher has the 40 layers of Llama-2-13b at a tenth of its width and vocabulary. The student has
two of these layers. It takes several minutes on two cores.

It reads and writes regression-PROCESSOR.json: for each stage and variant, how many times as fast as
the baseline it is. Without such a file for this processor, the first run writes it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import shapes
from processor import BENCHMARKS, slug

STAGES = ("distill", "tune", "transfer")
TOLERATED_LOSS = 0.2
"""Fraction of a ratio that noise may take away."""
PEERS = ("published", "ordinary", "opacus", "TRL", "Liger", "cached, plain torch")
"""How the names of variants begin that are not ours. Their speed is not compared."""

Speedups = dict[str, dict[str, float]]
"""Speed over the baseline, by stage and variant."""


def run_post_dist(*arguments: str) -> dict[str, Any]:
    """Run `post-dist` with `--json` and return the object that it prints."""
    command = [sys.executable, "-m", "post_dist", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def bench_stages() -> dict[str, dict[str, Any]]:
    """Return what `post-dist bench` measures, by stage."""
    with tempfile.TemporaryDirectory() as scratch:
        run = shapes.write_run(Path(scratch), width=512, layers=40, vocabulary=3200)
        # One step of distill makes a student: its values do not change what a step costs.
        student = run_post_dist("distill", str(run))["artifact"]
        results = {}
        for stage in STAGES:
            results[stage] = run_post_dist(
                "bench", stage, str(run), f"--set=inputs.student={student}"
            )
    return results


def print_result(stage: str, result: dict[str, Any]) -> None:
    """Print one stage's measurements as a table."""
    print(f"\n{stage}, {result['device']}; largest difference {result['max_difference']:.1e}")
    for row in result["rows"]:
        name = row["name"]
        speedup = 1 / result["ratios"][name]
        memory = result["memory_ratios"][name]
        seconds = row["seconds_per_step"]
        print(f"  {name:32} {seconds:8.3f} s  {speedup:6.2f} x as fast  {memory:5.2f} x the memory")


def lost_speedups(committed: Speedups, measured: Speedups) -> list[str]:
    """Return a line for each of our variants that lost more than a fifth of its speedup.

    The speedup is that over the published loop in the same precision, where there is one.
    """
    # Peers are left out: a slower peer is not a loss of ours. A variant without a committed ratio
    # is new, and passes.
    lost = []
    for stage, variants in measured.items():
        known = committed[stage]
        for name in variants:
            if name.startswith(PEERS) or name not in known:
                continue
            # Processors of one name differ in how much bf16 gains.
            before = known[name] / known.get(_peer_of(name), 1.0)
            now = variants[name] / variants.get(_peer_of(name), 1.0)
            if now < (1 - TOLERATED_LOSS) * before:
                lost.append(f"{stage}, {name}: {before:.2f} x before, {now:.2f} x now")
    return lost


def _peer_of(name: str) -> str:
    """Return the name of the published loop in the precision of a variant."""
    return f"published loop {name.rsplit(' ', 1)[1]}" if " " in name else ""


def main() -> None:
    """Run the three benchmarks, print them, and compare them or write them down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="replace the committed ratios")
    write = parser.parse_args().write
    # The subprocesses inherit these. The tokenizers' threads would disturb the timing.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    # Ratios within one run cancel much of the machine's noise; seconds would not.
    results = bench_stages()
    measured: Speedups = {}
    for stage, result in results.items():
        print_result(stage, result)
        measured[stage] = {name: 1 / ratio for name, ratio in result["ratios"].items()}

    # Ratios differ between processors, so each has a file of its own.
    path = BENCHMARKS / f"regression-{slug(results['distill']['device'])}.json"
    if write or not path.exists():
        path.write_text(json.dumps(measured, indent=2) + "\n")
        print(f"\nwritten: {path}")
        return
    lost = lost_speedups(json.loads(path.read_text()), measured)
    print()
    print("\n".join(lost) or "no ratio fell by more than a fifth")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
