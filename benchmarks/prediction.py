"""Compare the plan's time and memory of a step with real ranks on this machine.

    python benchmarks/prediction.py time       # measures time on two ranks, then compares
    python benchmarks/prediction.py memory     # measures memory on two and four ranks, too
    python benchmarks/prediction.py compare    # only compares earlier measurements

`time` and `memory` take about half an hour each on two cores. They write
prediction-time-PROCESSOR.json and prediction-memory-PROCESSOR.json. Each part then writes
prediction-PROCESSOR.md from these files. `time` must have run before the others.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import shapes
from prediction_settings import FIT, HELD_OUT, MEMORY, Setting
from prediction_tables import report
from processor import results_file, run_on_ranks

from post_dist.bench.scale import MEASURED_STEPS, bench_scale
from post_dist.runtime.distributed import start
from post_dist.runtime.stop import end_process

PARTS = ("time", "memory", "compare")
MEMORY_STEPS = 2
"""Memory is the same in all steps, so it takes fewer of them than time."""


def main() -> None:
    """Measure and compare; or, on a rank that this program has started, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("setting", nargs="?", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    # torchrun starts this file again on each rank, with its part as argument.
    if "WORLD_SIZE" in os.environ:
        measure_on_rank(chosen.part, chosen.setting)
        return

    # Each measurement has a file of its own, because the two take half an hour each.
    times_file = results_file("prediction-time", ".json")
    memories_file = results_file("prediction-memory", ".json")
    if chosen.part == "time":
        write_json(times_file, measure_time())
    elif chosen.part == "memory":
        write_json(memories_file, measure_memory())
    # The page holds all that has been measured so far.
    if not times_file.exists():
        raise SystemExit(f"{times_file} is missing: run `python benchmarks/prediction.py time`")
    memories = json.loads(memories_file.read_text()) if memories_file.exists() else []
    text = report(json.loads(times_file.read_text()), memories)
    results_file("prediction", ".md").write_text(text)


def measure_time() -> list[dict[str, Any]]:
    """Measure all settings of the fit and those held out, in the same two processes."""
    return printed_objects(run_on_ranks(2, [__file__, "time"]))


def measure_memory() -> list[dict[str, Any]]:
    """Measure the memory of each setting, in processes of its own."""
    measurements = []
    for number, (ranks, _) in enumerate(MEMORY):
        # glibc then returns freed memory at once, so that resident memory is what a rank holds.
        environment = {"MALLOC_MMAP_THRESHOLD_": "65536"}
        printed = run_on_ranks(ranks, [__file__, "memory", str(number)], environment)
        _, measured = printed_objects(printed)
        measurements.append(measured)
        print(measured["rows"][0]["per_rank"][0], flush=True)
    return measurements


def printed_objects(text: str) -> list[dict[str, Any]]:
    """Return the JSON objects among printed lines."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def measure_on_rank(part: str, number: int | None) -> None:
    """Measure the settings of a part on this rank.

    Args:
        part: time or memory.
        number: the setting's place in `MEMORY`.
    """
    if part == "time":
        measure_settings(FIT + HELD_OUT, MEASURED_STEPS)
    elif number is not None:
        _, setting = MEMORY[number]
        # A tiny model runs first, so that what libraries load at first use is there before the
        # measurement.
        measure_settings([setting._replace(width=128, layers=2), setting], MEMORY_STEPS)
    end_process(0)


def measure_settings(settings: list[Setting], steps: int) -> None:
    """Measure settings one after the other. All ranks call this function; rank 0 prints.

    Args:
        settings: models, batches and engines.
        steps: number of steps to measure.
    """
    world = start(0)
    with tempfile.TemporaryDirectory() as own:
        # Every rank makes a folder, and all of them use that of rank 0.
        scratch = Path(world.from_main(own))
        for number, setting in enumerate(settings):
            folder = scratch / str(number)
            if world.is_main:
                shapes.write_run(
                    folder,
                    width=setting.width,
                    layers=setting.layers,
                    vocabulary=setting.vocabulary,
                )
            # The other ranks read the model only once it is complete.
            world.barrier()
            config = setting.load_config(folder / "run.yaml")
            measured = bench_scale(config, folder / "model", world, steps)
            if world.is_main:
                print(json.dumps(measured | setting._asdict()), flush=True)
        world.leave()


if __name__ == "__main__":
    main()
