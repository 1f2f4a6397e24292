"""Profile a step: its kernels, and how long the GPU waits between them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from post_dist.bench.timing import wait_for

_TOP = 6
_WAITS = ("aten::_local_scalar_dense", "aten::nonzero")
"""Operations that wait for the GPU, because the host reads a value from it."""


@dataclass(frozen=True)
class StepProfile:
    """What a profiler saw of one step.

    Attributes:
        kernels: number of kernels and copies on the GPU; on a CPU, of operations.
        milliseconds: from the start of the first kernel to the end of the last.
        busy: share of this time in which a kernel ran.
        waits: number of times that the host read a value from the device.
        top: name, number and milliseconds of the kernels that took most of the time.
    """

    kernels: int
    milliseconds: float
    busy: float
    waits: int
    top: list[tuple[str, int, float]]

    def text(self, name: str) -> str:
        """Return the profile as a Markdown list."""
        lines = [
            f"- {name}: {self.kernels} kernels in {self.milliseconds:.1f} ms, "
            f"the device busy {self.busy:.0%} of the time, {self.waits} reads by the host"
        ]
        for kernel, count, milliseconds in self.top:
            lines.append(f"    - {milliseconds:.2f} ms in {count} x `{kernel[:80]}`")
        return "\n".join(lines) + "\n"


def profile_step(step: Callable[[], object], device: torch.device) -> StepProfile:
    """Profile one step that has run before."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        step()
        wait_for(device)
    events = list(recorded.events())
    kernels = [event for event in events if _is_kernel(event, device)]

    counts: Counter[str] = Counter()
    microseconds: Counter[str] = Counter()
    for kernel in kernels:
        counts[kernel.name] += 1
        microseconds[kernel.name] += kernel.time_range.elapsed_us()
    top = []
    for name, spent in microseconds.most_common(_TOP):
        top.append((name, counts[name], spent / 1000))
    first = min(kernel.time_range.start for kernel in kernels)
    last = max(kernel.time_range.end for kernel in kernels)
    return StepProfile(
        kernels=len(kernels),
        milliseconds=(last - first) / 1000,
        busy=_covered(kernels) / (last - first),
        waits=sum(event.name in _WAITS for event in events),
        top=top,
    )


def _is_kernel(event: Any, device: torch.device) -> bool:
    """Return whether an event is a kernel; on a CPU, an operation that calls no other."""
    if device.type != "cuda":
        return event.name.startswith("aten::") and not event.cpu_children
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation


def _covered(kernels: list[Any]) -> float:
    """Return the microseconds in which at least one kernel runs."""
    covered = 0.0
    end = 0.0
    for kernel in sorted(kernels, key=lambda kernel: kernel.time_range.start):
        start = max(end, kernel.time_range.start)
        end = max(end, kernel.time_range.end)
        covered += end - start
    return covered
