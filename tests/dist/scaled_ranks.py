"""Run on ranks: `bench scale` with several settings in one process, as JSON.

    scaled_ranks.py FOLDER SETTINGS [KEY=VALUE]...

SETTINGS are names of settings, joined by semicolons.
With the setting `slow rank`, the last rank sleeps in every matrix product.
"""

import json
import sys
import time
from pathlib import Path

import torch

from post_dist.bench.scale import bench_scale
from post_dist.config.load import load_run
from post_dist.runtime.distributed import start
from post_dist.runtime.stop import end_process

SETTINGS = {
    "ZeRO-0": ["engine.zero_stage=0"],
    "ZeRO-1": ["engine.zero_stage=1"],
    "ZeRO-3": ["engine.zero_stage=3"],
    "ZeRO-2, frozen block": ["engine.zero_stage=2", "student.frozen_lower_layers=1"],
    "ZeRO-3, frozen block": ["engine.zero_stage=3", "student.frozen_lower_layers=1"],
    "two passes": ["engine.zero_stage=1", "distill.micro_batch_size_per_gpu=1"],
    "passes served by twos": [
        "engine.zero_stage=2",
        "distill.micro_batch_size_per_gpu=1",
        "distill.teacher_micro_batch_size_per_gpu=2",
    ],
    "mixture": ["engine.zero_stage=1"],
    "slow rank": [],
}


def main() -> None:
    folder = Path(sys.argv[1])
    names = sys.argv[2].split(";")
    options = sys.argv[3:]
    world = start(0)
    found = {}
    for name in names:
        place = folder / "mixture" if name == "mixture" else folder
        config = load_run(place / "run.yaml", [*SETTINGS[name], *options], place)
        if name == "slow rank" and world.rank == world.size - 1:
            torch.nn.modules.module.register_module_forward_hook(
                lambda module, *_: time.sleep(0.01 * isinstance(module, torch.nn.Linear))
            )
        found[name] = bench_scale(config, place / "teacher", world, steps=2)
    if world.is_main:
        print(json.dumps(found))
    world.leave()
    end_process(0)


if __name__ == "__main__":
    main()
