"""`post-dist bench fabric`: the rates that this machine's processors, memory and links reach.

The result is an entry of a hardware file for `post-dist plan --hardware`.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from post_dist.bench.timing import device_name, seconds_of
from post_dist.config.precision import Precision
from post_dist.config.schema import Engine
from post_dist.config.yaml_files import write_yaml
from post_dist.files import writing
from post_dist.runtime.distributed import World, prepare_deepspeed
from post_dist.runtime.precision import DTYPES, choose_precision

_REPEATS = 5
_MATRIX_SIZES = {"cuda": 4096, "cpu": 1024}
"""Size n of the n x n matrices whose product is timed. Larger ones take minutes on a CPU."""
_RECEIVED_BYTES = tuple(1 << power for power in range(12, 27, 2))
"""Bytes that each rank receives in the timed collectives: 4 KiB to 64 MiB."""
_FP32_BYTES = 4
_GIB = 2**30


@dataclass(frozen=True)
class _TimedCollective:
    """The time of one collective at one size."""

    collective: str
    received_bytes: float
    seconds: float


@dataclass(frozen=True)
class FittedLink:
    """Latency and bandwidth of a link, with the measurements that they were fitted to."""

    latency_seconds: float
    bytes_per_second: float
    measurements: list[_TimedCollective]

    def hardware_fields(self) -> dict[str, float]:
        """Return the link as a hardware file describes it."""
        return {
            "gb_per_second": self.bytes_per_second / 1e9,
            "latency_us": self.latency_seconds * 1e6,
        }


_FREE_LINK = FittedLink(latency_seconds=0.0, bytes_per_second=1e15, measurements=[])
"""The link of a rank without neighbors. No collective uses it, so it costs nothing."""


def measure_fabric(world: World) -> dict[str, Any]:
    """Measure the machine. All ranks call this function together.

    Returns:
        `device` and `ranks`. `hardware`: an entry of a hardware file. Its rates are the measured
        ones, so all its shares are 1. `collectives`: for each link, the received bytes and the
        seconds of each timed collective.
    """
    # The collectives are part of what is measured, also on one rank.
    prepare_deepspeed(world)
    # Every rank computes at the same time, as in training: the ranks of a node share its power.
    ranks_per_node = world.ranks_of_a_node()
    teraflops = _reached_teraflops(world.device)

    # A group that spans nodes is as fast as the network. On one node, the network is never used.
    node = measure_link(world, ranks_per_node)
    has_network = world.size > ranks_per_node
    network = measure_link(world, world.size) if has_network else node

    host_memory_bytes = _host_memory_bytes()
    if world.device.type == "cuda":
        memory_bytes = float(torch.cuda.get_device_properties(world.device).total_memory)
    else:
        # The ranks of a node share the memory of their host.
        memory_bytes = host_memory_bytes / ranks_per_node

    hardware = {
        "memory_gib": memory_bytes / _GIB,
        "teraflops": teraflops,
        "memory_gb_per_second": _device_copy_rate(world.device) / 1e9,
        "node": node.hardware_fields() | {"gpus": ranks_per_node},
        "network": network.hardware_fields(),
        "host": {
            "memory_gib": host_memory_bytes / _GIB,
            "gb_per_second": _host_copy_rate(world.device) / 1e9,
        },
        "share": dict.fromkeys(("compute", "memory", "node", "network", "host"), 1.0),
        "overlap": world.device.type == "cuda",
    }
    return {
        "device": device_name(world.device),
        "ranks": world.size,
        "hardware": hardware,
        "collectives": {
            "node": [vars(each) for each in node.measurements],
            "network": [vars(each) for each in network.measurements],
        },
    }


def write_hardware(path: Path, measured: dict[str, Any]) -> None:
    """Write the result of `measure_fabric` as a hardware file with one entry, `measured`."""
    origin = f"# {measured['device']}, {measured['ranks']} ranks: by `post-dist bench fabric`\n"
    with writing(path):
        path.write_text(origin + write_yaml({"measured": measured["hardware"]}))


def _reached_teraflops(device: torch.device) -> dict[str, float]:
    """Return the rate of matrix products at each precision that the device runs well."""
    # A processor without bf16 instructions would take minutes, so bf16 is timed only where `auto`
    # chooses it.
    precisions: list[Precision] = ["fp32"]
    chosen = choose_precision(Engine(), device)
    if chosen != "fp32":
        precisions.append(chosen)
    size = _MATRIX_SIZES[device.type]
    return {name: _matrix_rate(size, DTYPES[name], device) / 1e12 for name in precisions}


def _matrix_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the operations per second of a product of two square matrices."""
    # A product takes n multiplications and n additions for each of its n * n entries.
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / _median_seconds(lambda: left @ right, device)


def _device_copy_rate(device: torch.device) -> float:
    """Return the bytes per second of a copy in the device's memory, reads and writes counted."""
    block = torch.empty(1 << 26, device=device)
    return 2 * block.nbytes / _median_seconds(lambda: block.clone(), device)


def _host_copy_rate(device: torch.device) -> float:
    """Return the bytes per second of a copy from the host's memory to the device."""
    # Offloading copies from pinned memory, which is faster than pageable memory.
    block = torch.empty(1 << 24, pin_memory=device.type == "cuda")
    return block.nbytes / _median_seconds(lambda: block.to(device, copy=True), device)


def _host_memory_bytes() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith("MemTotal:"))
    return 1024.0 * int(kib)


def measure_link(world: World, ranks: int) -> FittedLink:
    """Time all-gathers and all-reduces among neighbors over a range of sizes, and fit the link.

    All ranks call this function together.

    Args:
        world: all ranks. Each group of neighbors measures at the same time.
        ranks: number of neighbors in a group.
    """
    if ranks == 1:
        return _FREE_LINK
    # All ranks must take part in making every group, even a group that they do not belong to.
    groups = []
    for first in range(0, world.size, ranks):
        groups.append(dist.new_group(list(range(first, first + ranks))))
    group: Any = groups[world.rank // ranks]

    # Small sizes show the latency, large ones the bandwidth.
    measurements = []
    for received_bytes in _RECEIVED_BYTES:
        measurements.append(_time_all_gather(received_bytes, ranks, group, world.device))
        measurements.append(_time_all_reduce(received_bytes, ranks, group, world.device))
    latency_seconds, bytes_per_second = fit_link(
        [each.received_bytes for each in measurements],
        [each.seconds for each in measurements],
    )
    return FittedLink(latency_seconds, bytes_per_second, measurements)


def _time_all_gather(
    received_bytes: int, ranks: int, group: dist.ProcessGroup, device: torch.device
) -> _TimedCollective:
    """Time an all-gather in which each rank receives about the given number of bytes."""
    # A rank receives the part of every other rank.
    count = max(1, received_bytes // _FP32_BYTES // (ranks - 1))
    own = torch.zeros(count, device=device)
    gathered = torch.zeros(count * ranks, device=device)
    seconds = _median_seconds(
        lambda: dist.all_gather_into_tensor(gathered, own, group=group), device
    )
    return _TimedCollective("all-gather", (ranks - 1) * own.nbytes, seconds)


def _time_all_reduce(
    received_bytes: int, ranks: int, group: dist.ProcessGroup, device: torch.device
) -> _TimedCollective:
    """Time an all-reduce in which each rank receives about the given number of bytes."""
    # A ring brings each rank the tensor almost twice: once to sum it, once to share the sums.
    count = max(1, received_bytes // (2 * _FP32_BYTES) * ranks // (ranks - 1))
    summed = torch.zeros(count, device=device)
    seconds = _median_seconds(lambda: dist.all_reduce(summed, group=group), device)
    return _TimedCollective("all-reduce", 2 * (ranks - 1) / ranks * summed.nbytes, seconds)


def fit_link(received: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Fit latency and bandwidth to the times of collectives.

    The model is seconds = latency + bytes / bandwidth. The fit minimizes the squared relative
    error.

    Args:
        received: bytes that a rank receives in each collective.
        seconds: time of each collective.

    Returns:
        Latency in seconds, at least 0, and bandwidth in bytes per second.
    """
    sizes = np.asarray(received, dtype=float)
    times = np.asarray(seconds)
    # Division by the time makes the error relative, so that small collectives count as much.
    design = np.stack([np.ones_like(sizes), sizes], axis=1) / times[:, None]
    solution = np.linalg.lstsq(design, np.ones_like(times), rcond=None)[0]
    latency_seconds, seconds_per_byte = solution.tolist()
    # Noise can make either of them negative.
    return max(0.0, latency_seconds), 1 / max(seconds_per_byte, 1e-15)


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median time of five repeats, after one to warm up."""
    work()
    return statistics.median(seconds_of(work, device) for _ in range(_REPEATS))
