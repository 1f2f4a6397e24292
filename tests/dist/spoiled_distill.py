"""Run by torchrun: distill, with a loss that is no number on rank 1 at some steps.

    spoiled_distill.py FIRST LAST RUN.yaml [--set ...]
"""

import sys

import torch

from post_dist import cli
from post_dist.config.schema import RunConfig
from post_dist.runtime.distributed import World

first, last = int(sys.argv[1]), int(sys.argv[2])
sys.argv = ["post-dist", "distill", *sys.argv[3:]]
start = cli._start


def start_and_spoil(config: RunConfig) -> World:
    world = start(config)
    from post_dist.stages import distill  # imports DeepSpeed, for which `start` has prepared the environment

    real = distill.DistillationModel.forward
    calls = 0

    def forward(self: distill.DistillationModel, *given: torch.Tensor) -> tuple:
        nonlocal calls
        calls += 1
        loss, terms, hidden = real(self, *given)
        return (loss * float("nan") if world.rank == 1 and first <= calls <= last else loss), terms, hidden

    distill.DistillationModel.forward = forward
    return world


cli._start = start_and_spoil
cli.main()
