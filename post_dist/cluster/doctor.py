"""What a machine lacks for post_dist: one line for each thing, with its cure."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

_FREE_GIB = 20
_CLOCK_SECONDS = 5.0
_LOCK_SECONDS = 600.0
"""A compiler that DeepSpeed has started has ended by then."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        ok: whether it will do.
        found: what is there.
        cure: what to do about it; empty when it is well.
    """

    name: str
    ok: bool
    found: str
    cure: str = ""


def examine(folder: Path) -> list[Finding]:
    """Look at this machine and at the folder that is to hold the runs."""
    checks: list[Callable[[Path], Iterator[Finding]]] = [_python, _torch, _deepspeed, _slurm, _disk]
    return [finding for check in checks for finding in check(folder)]


def build_ops() -> list[str]:
    """Compile what DeepSpeed would compile in the middle of a job, as far as this machine allows; the names of what was built."""
    _use_own_cache()
    import torch
    from deepspeed.ops.op_builder import AsyncIOBuilder, QuantizerBuilder

    wanted = [AsyncIOBuilder()] + ([QuantizerBuilder()] if torch.cuda.is_available() else [])
    possible = [builder for builder in wanted if builder.is_compatible(verbose=False)]
    for builder in possible:
        builder.load()
    return [builder.NAME for builder in possible]


def op_cache() -> Path:
    """Where DeepSpeed keeps what it compiles: beside the environment that uses it."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix) / "torch_extensions")


def _use_own_cache() -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = str(op_cache())
    os.environ["PATH"] = (
        f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"  # ninja lies there
    )


def _python(folder: Path) -> Iterator[Finding]:
    wanted = sys.version_info >= (3, 11)
    yield Finding(
        "python", wanted, platform.python_version(), "" if wanted else "take Python 3.11 or newer"
    )


def _torch(folder: Path) -> Iterator[Finding]:
    import torch

    yield Finding("torch", True, torch.__version__)
    if torch.cuda.is_available():
        names = sorted(
            {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        )
        yield Finding(
            "CUDA",
            True,
            f"{torch.version.cuda}, {torch.cuda.device_count()} GPUs: {', '.join(names)}",
        )
        yield Finding("NCCL", True, ".".join(map(str, torch.cuda.nccl.version())))
        return
    drivers = shutil.which("nvidia-smi") is not None
    cure = (
        "this torch is a CPU build, or too new for the driver: install the build for its CUDA version"
        if drivers
        else ""
    )
    yield Finding(
        "CUDA",
        not drivers,
        "none, but a driver is here" if drivers else "none: stages run on the CPU over gloo",
        cure,
    )


def _deepspeed(folder: Path) -> Iterator[Finding]:
    yield Finding("deepspeed", True, version("deepspeed"))
    cache = op_cache()
    locks = [
        lock for lock in cache.glob("**/lock") if time.time() - lock.stat().st_mtime > _LOCK_SECONDS
    ]
    if locks:
        yield Finding(
            "ops",
            False,
            f"a killed compiler left {locks[0]}",
            "remove the file: every start that needs this op waits for it forever",
        )
    else:
        built = sorted(path.parent.name for path in cache.glob("**/*.so"))
        yield Finding(
            "ops",
            True,
            f"in {cache}: {', '.join(built) or 'none; only offload: nvme and quantized_gathers need some'}",
        )
    lacking = [
        tool
        for tool in ("g++", "ninja")
        if shutil.which(tool, path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
        is None
    ]
    if lacking:
        yield Finding(
            "compiler",
            True,
            f"no {' and no '.join(lacking)}: offload: nvme and quantized_gathers will not do",
        )


def _slurm(folder: Path) -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        yield Finding("Slurm", True, "none: use torchrun, deepspeed, or submit --local")
        return
    answer = _run("sinfo", "--version")
    up = _run("scontrol", "ping")
    alive = up.returncode == 0 and " is UP" in up.stdout
    yield Finding(
        "Slurm",
        alive,
        answer.stdout.strip(),
        "" if alive else "slurmctld does not answer: ask whoever runs the cluster",
    )
    accounting = _run("sacct", "--noheader", "--starttime=now")
    cure = (
        ""
        if accounting.returncode == 0
        else "without it the end of a job is known for some minutes only (MinJobAge): follow it with --wait"
    )
    yield Finding(
        "accounting",
        accounting.returncode == 0,
        "answers" if not cure else accounting.stderr.strip().splitlines()[-1],
        cure,
    )


def _disk(folder: Path) -> Iterator[Finding]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".post_dist-doctor-") as file:
            now = time.time()
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
            off = os.stat(file.name).st_mtime - now
    except OSError as error:
        yield Finding(
            "folder",
            False,
            f"{folder.resolve()}: {error.strerror}",
            "give a folder that every node may write to",
        )
        return
    kind = _run("stat", "--file-system", "--format=%T", str(folder)).stdout.strip()
    alone = shutil.which("sbatch") is not None and kind in ("tmpfs", "overlayfs")
    yield Finding(
        "folder",
        not alone,
        f"{folder.resolve()} ({kind})",
        "other nodes do not see it: give a shared folder" if alone else "",
    )
    free = shutil.disk_usage(folder).free / 2**30
    cure = (
        ""
        if free >= _FREE_GIB
        else f"less than {_FREE_GIB} GiB: a student's checkpoints take 12 bytes a parameter, twice"
    )
    yield Finding("space", not cure, f"{free:.0f} GiB free", cure)
    right = abs(off) < _CLOCK_SECONDS
    yield Finding(
        "clock",
        right,
        f"{off:+.1f} s between the folder's server and this machine",
        "" if right else "start NTP on both",
    )


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
