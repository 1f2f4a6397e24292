"""`post-dist bench fabric`: what this machine's processors, memory and links reach, as an entry for `post-dist plan --hardware`."""

import statistics
from collections.abc import Callable, Sequence
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
from post_dist.runtime.distributed import World
from post_dist.runtime.precision import choose_precision

_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_REPEATS = 5
_SIZES = tuple(1 << power for power in range(12, 27, 2))
"""Bytes that a rank takes in, 4 KiB to 64 MiB."""
_GIB = 2**30


def measure_fabric(world: World) -> dict[str, Any]:
    """Measure; all ranks call it.

    Returns:
        `hardware`, an entry of the hardware file whose figures are what was reached, so that all its shares are 1; and `collectives`, for
        each link and collective the size, the seconds, and the fit.
    """
    local_ranks = world.ranks_of_a_node()
    size = 4096 if world.device.type == "cuda" else 1024
    precisions = {
        "fp32",
        choose_precision(Engine(), world.device),
    }  # a processor without bf16 instructions would take minutes
    teraflops = {
        name: _matrix_rate(size, dtype, world.device) / 1e12
        for name, dtype in _DTYPES.items()
        if name in precisions
    }
    links: dict[str, Any] = {"node": _links(world, local_ranks)}
    links["network"] = _links(world, world.size) if world.size > local_ranks else links["node"]
    found = {
        name: {
            "gb_per_second": link["bytes_per_second"] / 1e9,
            "latency_us": link["latency_seconds"] * 1e6,
        }
        for name, link in links.items()
    }
    cuda, host = world.device.type == "cuda", _host_memory()
    entry = {
        "memory_gib": (
            torch.cuda.get_device_properties(world.device).total_memory
            if cuda
            else host / local_ranks
        )
        / _GIB,
        "teraflops": teraflops,
        "memory_gb_per_second": _copy_rate(world.device) / 1e9,
        "node": found["node"] | {"gpus": local_ranks},
        "network": found["network"],
        "host": {"memory_gib": host / _GIB, "gb_per_second": _host_rate(world.device) / 1e9},
        "share": dict.fromkeys(("compute", "memory", "node", "network", "host"), 1.0),
        "overlap": cuda,
    }
    collectives = {name: link["measured"] for name, link in links.items()}
    return {
        "device": device_name(world.device),
        "ranks": world.size,
        "hardware": entry,
        "collectives": collectives,
    }


def write_hardware(path: Path, measured: dict[str, Any]) -> None:
    """A hardware file of one entry, `measured`."""
    with writing(path):
        path.write_text(
            f"# {measured['device']}, {measured['ranks']} ranks: by `post-dist bench fabric`\n"
            + write_yaml({"measured": measured["hardware"]})
        )


def _matrix_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second in a product of two square matrices."""
    one, other = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / _seconds(lambda: one @ other, device)


def _copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written."""
    block = torch.empty(1 << 26, device=device)
    return 2 * block.nbytes / _seconds(lambda: block.clone(), device)


def _host_rate(device: torch.device) -> float:
    """Bytes a second from the host's memory."""
    block = torch.empty(1 << 24, pin_memory=device.type == "cuda")
    return block.nbytes / _seconds(lambda: block.to(device, copy=True), device)


def _host_memory() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024.0 * int(next(line.split()[1] for line in lines if line.startswith("MemTotal:")))


def _links(world: World, ranks: int) -> dict[str, Any]:
    """Latency and bandwidth of all-gathers and all-reduces among neighbours, fitted to what they take over sizes."""
    if ranks == 1:  # nothing to measure: as if it cost nothing
        return {"latency_seconds": 0.0, "bytes_per_second": 1e15, "measured": []}
    groups = [
        dist.new_group(list(range(first, first + ranks))) for first in range(0, world.size, ranks)
    ]
    group = groups[world.rank // ranks]
    measured: list[dict[str, Any]] = []
    for received in _SIZES:
        count = max(1, received // 4 // (ranks - 1))
        own, whole = (
            torch.zeros(count, device=world.device),
            torch.zeros(count * ranks, device=world.device),
        )
        summed = torch.zeros(max(1, received // 8 * ranks // (ranks - 1)), device=world.device)
        for name, call, size in (
            (
                "all-gather",
                lambda own=own, whole=whole: dist.all_gather_into_tensor(whole, own, group=group),
                (ranks - 1) * own.nbytes,
            ),
            (
                "all-reduce",
                lambda summed=summed: dist.all_reduce(summed, group=group),
                2 * (ranks - 1) / ranks * summed.nbytes,
            ),
        ):
            measured.append(
                {
                    "collective": name,
                    "received_bytes": size,
                    "seconds": _seconds(call, world.device),
                }
            )
    latency, rate = fit_link(
        [entry["received_bytes"] for entry in measured], [entry["seconds"] for entry in measured]
    )
    return {"latency_seconds": latency, "bytes_per_second": rate, "measured": measured}


def fit_link(received: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Alpha and beta of seconds = alpha + bytes / beta, by least squares of the relative error."""
    sizes, times = np.asarray(received), np.asarray(seconds)
    design = np.stack([np.ones_like(sizes, dtype=float), sizes], axis=1) / times[:, None]
    (alpha, per_byte), *_ = np.linalg.lstsq(design, np.ones_like(times), rcond=None)
    return max(0.0, float(alpha)), 1 / max(float(per_byte), 1e-15)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of a few, after one to warm up."""
    work()
    return statistics.median(seconds_of(work, device) for _ in range(_REPEATS))
