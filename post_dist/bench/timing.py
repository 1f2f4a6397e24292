"""Time and memory of steps.

Variants of a step take turns: the first repeat of every variant, then the second of every variant.
A minute in which the machine is slow then slows all of them.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from post_dist.errors import EnvironmentFault
from post_dist.runtime.allocator import memory_given_back_at_once

# Odd, so that the median is one of the measured times.
_REPEATS = 7
_MIB = 2**20

Measure = Callable[[Mapping[str, Callable[[], object]], int, str, torch.device], dict[str, Any]]
"""Function that measures variants of a step, with the arguments and the result of `time_steps`."""


@dataclass
class _Measurement:
    """The measurement of one variant of a step.

    Attributes:
        peak_memory_mib: peak memory in MiB, without what was held before the step.
        seconds: time of each repeat.
    """

    peak_memory_mib: float
    seconds: list[float] = field(default_factory=list)

    def table_row(self, name: str, amount: int, unit: str) -> dict[str, Any]:
        """Return the variant's row of the table (see `time_steps`)."""
        median = statistics.median(self.seconds)
        lower_quartile, _, upper_quartile = statistics.quantiles(self.seconds, n=4)
        return {
            "name": name,
            "seconds_per_step": median,
            f"{unit}_per_second": amount / median,
            "peak_memory_mib": self.peak_memory_mib,
            "interval": [lower_quartile, upper_quartile],
        }

    def time_over(self, baseline: "_Measurement") -> float:
        """Return the ratio of this variant's time to that of the baseline."""
        # Both times of a pair come from the same round, so a slow round cancels.
        pairs = zip(self.seconds, baseline.seconds, strict=True)
        return statistics.median(own / other for own, other in pairs)

    def memory_over(self, baseline: "_Measurement") -> float:
        """Return the ratio of this variant's peak memory to that of the baseline."""
        return self.peak_memory_mib / baseline.peak_memory_mib


def time_steps(
    steps: Mapping[str, Callable[[], object]],
    amount: int,
    unit: str,
    device: torch.device,
    *,
    repeats: int = _REPEATS,
) -> dict[str, Any]:
    """Measure several variants of a step in turns.

    Each variant runs once to warm up, once for its memory, and several times for its time.

    Args:
        steps: the variants by name. The first is the baseline of the ratios.
        amount: number of units that one step processes.
        unit: unit of the amount, `samples` or `tokens`.
        device: device that the steps use.
        repeats: number of times that each variant is timed, at least 2.

    Returns:
        `device`: its name. `rows`: for each variant the median seconds per step, the amount per
        second, the interquartile range of the times, and the peak memory in MiB. Memory that was
        held before the step does not count. `ratios` and `memory_ratios`: each variant's time and
        memory, divided by the baseline's.
    """
    # The first call of a step compiles kernels and fills caches.
    for step in steps.values():
        step()

    # Memory and time come from separate runs: reading the peak of a CPU forces the allocator to
    # return memory at once, which slows it down.
    measurements: dict[str, _Measurement] = {}
    with memory_given_back_at_once():
        for name, step in steps.items():
            measurements[name] = _Measurement(_step_memory_mib(step, device))

    # The variants take turns, so that a slow minute of the machine slows all of them.
    for _ in range(repeats):
        for name, step in steps.items():
            measurements[name].seconds.append(seconds_of(step, device))

    # The first variant is the baseline of the ratios.
    baseline = next(iter(measurements.values()))
    rows = []
    time_ratios = {}
    memory_ratios = {}
    for name, measurement in measurements.items():
        rows.append(measurement.table_row(name, amount, unit))
        time_ratios[name] = measurement.time_over(baseline)
        memory_ratios[name] = measurement.memory_over(baseline)
    return {
        "device": device_name(device),
        "rows": rows,
        "ratios": time_ratios,
        "memory_ratios": memory_ratios,
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or that of the processor with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor_name()}, {torch.get_num_threads()} threads"


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "CPU"


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a piece of work takes, including its kernels on the GPU."""
    # Kernels that an earlier call queued must not count.
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished the work queued on it. A CPU has no queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _step_memory_mib(step: Callable[[], object], device: torch.device) -> float:
    """Return the peak memory of a step in MiB, without what was held before it."""
    held_mib = watch_memory(device)
    step()
    return peak_memory_mib(device) - held_mib


def watch_memory(device: torch.device) -> float:
    """Free unused memory and start a new measurement of the peak.

    Returns:
        The memory held now, in MiB.

    Raises:
        EnvironmentFault: the device is a CPU, and the system has no /proc.
    """
    # Reference cycles keep the tensors of earlier steps alive.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / _MIB
    clear_refs = Path("/proc/self/clear_refs")
    if not clear_refs.exists():
        raise EnvironmentFault(
            "peak memory on a CPU is read from /proc/self, which this system lacks",
            "run the benchmark on Linux",
        )
    # glibc keeps freed memory, which would count as held.
    ctypes.CDLL(None).malloc_trim(0)
    clear_refs.write_text("5")  # resets VmHWM, see proc(5)
    return _status_mib("VmRSS")


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory since the last `watch_memory`, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    return _status_mib("VmHWM")


def _status_mib(field_name: str) -> float:
    """Return a field of /proc/self/status, which counts in KiB, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field_name}:"):
            return float(line.split()[1]) / 1024
    raise EnvironmentFault(
        f"/proc/self/status has no field {field_name}", "run the benchmark on Linux"
    )
