"""`make bench`: each stage's benchmark on a model with random weights, beside the ratios that were committed for this processor.

The teacher has Llama-2-13b's 40 layers at a tenth of its width and vocabulary; the student has two of them.

    python benchmarks/regression.py [--write]
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

from post_dist.bench.timing import slug

STAGES = ("distill", "tune", "transfer")
MOST_LOST = 0.2
PEERS = ("published", "ordinary", "opacus", "TRL", "Liger", "cached, plain torch")
HERE = Path(__file__).parent


def figures(stage: str, run: Path, student: str) -> dict[str, Any]:
    """What `post-dist bench` says of a stage."""
    command = [
        sys.executable,
        "-m",
        "post_dist",
        "bench",
        stage,
        str(run),
        "--json",
        f"--set=inputs.student={student}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def slower(before: dict[str, dict[str, float]], now: dict[str, dict[str, float]]) -> list[str]:
    """Our ways that have lost more than a fifth of their lead over the first row."""
    return [
        f"{stage}, {name}: {before[stage][name]:.2f} x before, {speed:.2f} x now"
        for stage, ways in now.items()
        for name, speed in ways.items()
        if not name.startswith(PEERS) and speed < (1 - MOST_LOST) * before[stage].get(name, 0)
    ]


def main() -> None:
    """Run the three, print them, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="commit these ratios as those to keep")
    write = parser.parse_args().write
    os.environ |= {
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryDirectory() as scratch:
        run = shapes.write_run(Path(scratch), width=512, layers=40, vocabulary=3200)
        distill = [sys.executable, "-m", "post_dist", "distill", str(run), "--json"]
        student = json.loads(
            subprocess.run(distill, capture_output=True, text=True, check=True).stdout
        )["artifact"]
        found = {stage: figures(stage, run, student) for stage in STAGES}
    device = found["distill"]["device"]
    for stage, figure in found.items():
        print(f"\n{stage}, {device}; largest difference {figure['max_difference']:.1e}")
        for row in figure["rows"]:
            name, memory = row["name"], figure["memory_ratios"][row["name"]]
            print(
                f"  {name:32} {row['seconds_per_step']:8.3f} s  {1 / figure['ratios'][name]:6.2f} x as fast  {memory:5.2f} of the memory"
            )
    kept = HERE / f"regression-{slug(device)}.json"
    speed = {
        stage: {name: 1 / ratio for name, ratio in figure["ratios"].items()}
        for stage, figure in found.items()
    }
    if write or not kept.exists():
        kept.write_text(json.dumps(speed, indent=2) + "\n")
        print(f"\nwritten: {kept}")
        return
    lost = slower(json.loads(kept.read_text()), speed)
    print("\n" + ("\n".join(lost) or "no ratio has fallen by more than a fifth"))
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
