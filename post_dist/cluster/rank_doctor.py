"""Check the ranks of a launcher together: versions, clocks, the shared folder, and the links."""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast
from uuid import uuid4

from post_dist.cluster.doctor import Finding
from post_dist.extras import installed_versions
from post_dist.files import lock_file, make_folder, writing
from post_dist.planning.hardware import Hardware, LinkName

if TYPE_CHECKING:  # this import loads torch
    from post_dist.runtime.distributed import World

_PACKAGES = ("post_dist", "torch", "transformers", "deepspeed", "numpy", "safetensors")
_CLOCK_SECONDS = 5.0
_SECONDS_TO_BE_SEEN = 60.0
"""Longest time until other nodes see a new file. NFS remembers a failed lookup for 30 s."""
_POLL_SECONDS = 0.2
_SLOW = 0.5
"""Share of the planned rate below which a link counts as slow."""


def examine_ranks(folder: Path, world: "World", planned: Hardware | None) -> list[Finding]:
    """Check what only several ranks can. All ranks call it together.

    Args:
        folder: folder for the runs, which all nodes should see.
        world: the ranks, which have joined already.
        planned: the hardware that the plan assumes; None to compare no rates.

    Returns:
        The findings, the same on every rank.

    Raises:
        InputError: the folder cannot be written to.
    """
    hosts = world.gather_objects(socket.gethostname())
    names = ", ".join(sorted(set(hosts)))
    joined = f"{world.size} on {len(set(hosts))} hosts ({names}), by {world.launcher}"
    found = [Finding("ranks", True, joined)]
    found += _versions(world, hosts)
    found += _clocks(world, hosts)
    found += _shared_folder(world, hosts, folder)
    found += _gpu_errors(world, hosts)
    found += _links(world, planned)
    return found


def _versions(world: "World", hosts: list[str]) -> Iterator[Finding]:
    import torch

    own = installed_versions(_PACKAGES) | {"python": sys.version.split()[0]}
    if world.device.type == "cuda":
        own["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    versions = world.gather_objects(own)
    different = []
    for package in own:
        of_hosts = {each.get(package): host for each, host in zip(versions, hosts, strict=True)}
        if len(of_hosts) > 1:
            found = [f"{version} on {host}" for version, host in of_hosts.items()]
            different.append(f"{package} {', '.join(found)}")
    cure = "install the same environment on all nodes" if different else ""
    yield Finding("versions", not different, "; ".join(different) or "equal on all ranks", cure)


def _clocks(world: "World", hosts: list[str]) -> Iterator[Finding]:
    # Ranks leave a barrier at about the same time.
    world.barrier()
    times = world.gather_objects(time.time())
    spread = max(times) - min(times)
    cure = ""
    if spread > _CLOCK_SECONDS:
        latest = hosts[times.index(max(times))]
        earliest = hosts[times.index(min(times))]
        cure = f"start NTP: {latest} is ahead, {earliest} is behind"
    yield Finding("clocks", not cure, f"within {spread:.2f} s of each other", cure)


def _shared_folder(world: "World", hosts: list[str], folder: Path) -> Iterator[Finding]:
    """Write a file on each rank, look for those of all others, and try locks."""
    token = world.from_main(uuid4().hex[:8])
    paths = [folder / f".post_dist-doctor-{token}-{rank}" for rank in range(world.size)]

    def write() -> None:
        make_folder(folder)
        with writing(folder):
            paths[world.rank].write_text(hosts[world.rank])

    world.together(write)
    try:
        seconds = _seconds_until_seen(paths)
        waits = world.gather_objects(seconds)
        yield _visibility(waits, hosts)
        # Without a shared folder, there is no file to lock.
        if None not in waits and world.size > 1:
            yield _locks(world, paths[0])
    finally:
        world.barrier()
        paths[world.rank].unlink(missing_ok=True)


def _seconds_until_seen(paths: list[Path]) -> float | None:
    """Return how long it took until all files were there, or None if they did not come."""
    start = time.monotonic()
    while not all(path.exists() for path in paths):
        if time.monotonic() - start > _SECONDS_TO_BE_SEEN:
            return None
        time.sleep(_POLL_SECONDS)
    return time.monotonic() - start


def _visibility(waits: list[float | None], hosts: list[str]) -> Finding:
    blind = sorted({host for wait, host in zip(waits, hosts, strict=True) if wait is None})
    if blind:
        return Finding(
            "shared folder",
            False,
            f"files of other ranks are not seen on {', '.join(blind)}",
            "give a folder on a file system that all nodes share",
        )
    slowest = max(cast(list[float], waits))
    return Finding("shared folder", True, f"all ranks see new files within {slowest:.1f} s")


def _locks(world: "World", path: Path) -> Finding:
    """Lock a file on rank 0, and try to lock it on all others."""
    # Each rank opens the file by itself. Without locks, every rank believes that it holds one.
    with path.open("r+") as file:
        if world.is_main:
            lock_file(file)
        world.barrier()
        excluded = world.is_main or not lock_file(file)
        works = not world.any(not excluded)
    cure = "" if works else "start one command at a time in a run's folder"
    found = "a rank excludes the others" if works else "two ranks can hold one lock"
    return Finding("locks", works, found, cure)


def _gpu_errors(world: "World", hosts: list[str]) -> Iterator[Finding]:
    """Count memory errors that the GPU could not correct since its driver was loaded."""
    if world.device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return
    query = "--query-gpu=ecc.errors.uncorrected.volatile.total"
    index = f"--id={world.local_rank}"
    asked = subprocess.run(
        ["nvidia-smi", query, index, "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    answer = asked.stdout.strip()
    # A GPU without ECC answers [N/A].
    errors = world.gather_objects(int(answer) if answer.isdecimal() else 0)
    damaged = sorted({host for count, host in zip(errors, hosts, strict=True) if count})
    cure = f"take out {', '.join(damaged)}" if damaged else ""
    yield Finding("GPU memory", not damaged, f"{sum(errors)} uncorrected errors", cure)


def _links(world: "World", planned: Hardware | None) -> Iterator[Finding]:
    """Measure the collectives among all ranks, and compare them with the plan's rate."""
    import torch.distributed as dist

    from post_dist.bench.fabric import measure_link

    if world.size == 1:
        return
    ranks_per_node = world.ranks_of_a_node()
    name: LinkName = "network" if world.size > ranks_per_node else "node"
    rate = measure_link(world, world.size).bytes_per_second / 1e9
    # Each rank has its own clock and fit. Rank 0 decides.
    rate = world.from_main(rate)
    backend = dist.get_backend()
    found = f"{rate:.2f} GB/s into a rank over {backend}, among all ranks"
    if planned is None:
        yield Finding("links", True, found)
        return
    assumed = planned.bytes_per_second(name) / 1e9
    is_slow = rate < _SLOW * assumed
    cure = ""
    if is_slow:
        cure = "set the interfaces of NCCL in cluster.environment, or plan with `bench fabric`"
    yield Finding("links", not is_slow, f"{found}; the plan assumes {assumed:.2f}", cure)
