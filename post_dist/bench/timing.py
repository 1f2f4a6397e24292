"""Time and memory of steps, interleaved: the first of all, then the second of all, so that a slow minute slows every row."""

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from post_dist.errors import EnvironmentFault
from post_dist.runtime.allocator import memory_given_back_at_once

_REPEATS = 7
_MIB = 2**20


def measure(
    steps: Mapping[str, Callable[[], object]], amount: int, unit: str, device: torch.device
) -> dict[str, Any]:
    """Run each step once to warm up, once for its memory, and seven times for its time.

    Args:
        steps: by name; the first is what the ratios are over.
        amount: how much one step handles.
        unit: of the amount, `samples` or `tokens`.
        device: which the steps use.

    Returns:
        `rows` with the median of seconds per step, amount per second, peak memory above what was there before the step, and the
        interval of the middle half of the times; and `ratios` of time and of memory over the first row.
    """
    for step in steps.values():
        step()
    with memory_given_back_at_once():
        memory = {name: _peak_memory_mib(step, device) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(_REPEATS):
        for name, step in steps.items():
            seconds[name].append(seconds_of(step, device))
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        low, _, high = statistics.quantiles(times, n=4)
        rows.append(
            {
                "name": name,
                "seconds_per_step": median,
                f"{unit}_per_second": amount / median,
                "peak_memory_mib": memory[name],
                "interval": [low, high],
            }
        )
    first = next(iter(steps))
    # Of each round's own pair, so that what the machine did in a round cancels.
    ratios = {
        name: statistics.median(
            mine / base for mine, base in zip(times, seconds[first], strict=True)
        )
        for name, times in seconds.items()
    }
    memory_ratios = {name: value / memory[first] for name, value in memory.items()}
    return {
        "device": device_name(device),
        "rows": rows,
        "ratios": ratios,
        "memory_ratios": memory_ratios,
    }


def device_name(device: torch.device) -> str:
    """What the benchmark ran on: the card's name, or the processor's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU"
    )
    return f"{model}, {torch.get_num_threads()} threads"


def slug(device: str) -> str:
    """A device's name as part of a file's."""
    return re.sub("[^a-z0-9]+", "-", device.lower())


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long a piece of work takes, a GPU's part of it included."""
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def _peak_memory_mib(step: Callable[[], object], device: torch.device) -> float:
    """The most memory that a step holds above what was held before it."""
    held = watch_memory(device)
    step()
    return peak_memory_mib(device) - held


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was told; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def watch_memory(device: torch.device) -> float:
    """Give back what is not in use, and count the peak anew from here; what is held now, in MiB.

    Raises:
        EnvironmentFault: on a CPU of a system without /proc.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / _MIB
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        raise EnvironmentFault(
            "peak memory on a CPU is read from /proc/self, which this system lacks",
            "run the benchmark on Linux",
        )
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # the kernel then counts VmHWM anew
    return _status_mib("VmRSS")


def peak_memory_mib(device: torch.device) -> float:
    """The most that was held since `watch_memory`."""
    return (
        torch.cuda.max_memory_allocated(device) / _MIB
        if device.type == "cuda"
        else _status_mib("VmHWM")
    )


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return float(kib) / 1024
