"""This machine's processor: its name in the names of result files, and programs on its ranks."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from post_dist.bench.timing import device_name

BENCHMARKS = Path(__file__).resolve().parent
CPU = torch.device("cpu")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
"""Environment of a rank that computes on one thread of the processor."""
_PORT = 29640


def slug(device: str) -> str:
    """Return a device's name in the form for file names."""
    return re.sub("[^a-z0-9]+", "-", device.lower())


def results_file(name: str, suffix: str) -> Path:
    """Return the path of a file of results that carries the processor's name.

    Args:
        name: name of the benchmark.
        suffix: suffix with its dot, such as `.json`.
    """
    return BENCHMARKS / f"{name}-{slug(device_name(CPU))}{suffix}"


def run_on_ranks(
    ranks: int, program: Sequence[str], environment: Mapping[str, str] | None = None
) -> str:
    """Run a program under torchrun, each rank on one thread, and return what the ranks print.

    Args:
        ranks: number of ranks.
        program: arguments of `python`: a file or `-m MODULE`, and its own arguments.
        environment: further variables.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    launcher += [f"--nproc-per-node={ranks}", f"--master-port={_PORT}"]
    done = subprocess.run(
        [*launcher, *program],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | ONE_THREAD | (environment or {}),
    )
    return done.stdout
