"""Check a machine for what post_dist needs: one finding for each thing, with its cure."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from post_dist.extras import installed_versions, op_cache

_FREE_GIB = 20
_FREE_MEMORY_GIB = 4
_HUB_SECONDS = 3.0
_CONTAINERS = ("apptainer", "singularity", "enroot", "podman", "docker")
_CLOCK_SECONDS = 5.0
_LOCK_SECONDS = 600.0
"""No compilation takes longer, so an older compiler lock is abandoned."""
_SLURM_SECONDS = 30
"""Time limit of a Slurm command."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: what was checked.
        ok: whether it is good enough.
        found: what was found.
        cure: what to do about it; empty if nothing needs to be done.
    """

    name: str
    ok: bool
    found: str
    cure: str = ""


def examine(folder: Path) -> list[Finding]:
    """Check this machine and the folder for the runs."""
    findings: list[Finding] = []
    checks: list[Callable[[Path], Iterator[Finding]]] = [
        _python,
        _memory,
        _torch,
        _deepspeed,
        _hub,
        _containers,
        _slurm,
        _disk,
    ]
    for check in checks:
        findings += check(folder)
    return findings


def build_ops() -> list[str]:
    """Compile the DeepSpeed ops that a job would otherwise compile, if this machine can.

    Returns:
        The names of the compiled ops.
    """
    _use_own_cache()
    import torch

    # pyrefly: ignore[missing-module-attribute]
    from deepspeed.ops.op_builder import AsyncIOBuilder, QuantizerBuilder

    # NVMe offload needs the first op. Quantized gathers need the second, which needs CUDA.
    builders = [AsyncIOBuilder()]
    if torch.cuda.is_available():
        builders.append(QuantizerBuilder())
    built = []
    for builder in builders:
        if builder.is_compatible(verbose=False):
            builder.load()
            built.append(builder.NAME)
    return built


def _use_own_cache() -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = str(op_cache())
    os.environ["PATH"] = _path_with_ninja()


def _path_with_ninja() -> str:
    """Return PATH with this environment's own folder first, because it holds ninja."""
    return f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"


def _python(folder: Path) -> Iterator[Finding]:
    new_enough = sys.version_info >= (3, 11)
    cure = "" if new_enough else "install Python 3.11 or newer"
    yield Finding("python", new_enough, platform.python_version(), cure)


def _memory(folder: Path) -> Iterator[Finding]:
    # Only Linux has this file.
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return
    sizes = {}
    for line in meminfo.read_text().splitlines():
        name, _, size = line.partition(":")
        sizes[name] = int(size.split()[0]) / 2**20
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    cure = ""
    if free < _FREE_MEMORY_GIB:
        cure = f"less than {_FREE_MEMORY_GIB} GiB: torch and a small model need that much"
    yield Finding("memory", not cure, f"{total:.1f} GiB, {free:.1f} GiB free", cure)


def _torch(folder: Path) -> Iterator[Finding]:
    import torch

    # A driver without CUDA in torch means a wrong torch build. With neither, this is a CPU machine.
    yield Finding("torch", True, torch.__version__)
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
        yield Finding("CUDA", True, f"{torch.version.cuda}, {count} GPUs: {', '.join(names)}")
        for index in range(count):
            free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
            yield Finding(f"GPU {index}", True, f"{total:.1f} GiB, {free:.1f} GiB free")
        yield Finding("NCCL", True, ".".join(map(str, torch.cuda.nccl.version())))
    elif shutil.which("nvidia-smi") is not None:
        yield Finding(
            "CUDA",
            False,
            "none, but a driver is here",
            "this torch is a CPU build, or too new for the driver: "
            "install the build for its CUDA version",
        )
    else:
        yield Finding("CUDA", True, "none: stages run on the CPU over gloo")


def _deepspeed(folder: Path) -> Iterator[Finding]:
    installed = installed_versions(["deepspeed"])
    if not installed:
        yield Finding(
            "deepspeed",
            True,
            "none: an owner needs none to tune, evaluate or predict; "
            "for the provider's stages, pip install 'post_dist[provider]'",
        )
        return
    yield Finding("deepspeed", True, installed["deepspeed"])
    yield _ops()
    # Without a compiler, all but two options work, so this is not an error.
    missing = []
    for tool in ("g++", "ninja"):
        if shutil.which(tool, path=_path_with_ninja()) is None:
            missing.append(tool)
    if missing:
        tools = " and no ".join(missing)
        yield Finding(
            "compiler", True, f"no {tools}: offload: nvme and quantized_gathers will not work"
        )


def _ops() -> Finding:
    """Look for the lock of a killed compiler, and list the compiled ops."""
    # torch's lock has no owner, so a killed compiler leaves it forever.
    cache = op_cache()
    for lock in cache.glob("**/lock"):
        if time.time() - lock.stat().st_mtime > _LOCK_SECONDS:
            return Finding(
                "ops",
                False,
                f"a killed compiler left {lock}",
                "remove the file: every start that needs this op waits for it forever",
            )
    built = sorted(path.parent.name for path in cache.glob("**/*.so"))
    names = ", ".join(built)
    if not built:
        names = "none; only offload: nvme and quantized_gathers need some"
    return Finding("ops", True, f"in {cache}: {names}")


def _hub(folder: Path) -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    # Models and data in folders need neither hub nor token, so a lack is no fault.
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_HUB_SECONDS).close()
        found = "answers"
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        found = f"cannot be reached ({reason}): give folders in place of hub names"
    yield Finding("hub", True, found)
    missing = "none: a gated model needs one; `hf auth login`, or set HF_TOKEN"
    yield Finding("hub token", True, missing if get_token() is None else "found")


def _containers(folder: Path) -> Iterator[Finding]:
    found = [name for name in _CONTAINERS if shutil.which(name) is not None]
    yield Finding("containers", True, ", ".join(found) or "none")


def _slurm(folder: Path) -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        yield Finding("Slurm", True, "none: use torchrun, deepspeed, or submit --local")
        return
    # The Slurm commands may be installed although no controller answers.
    ping = _run("scontrol", "ping")
    answers = ping.returncode == 0 and " is UP" in ping.stdout
    cure = "" if answers else "slurmctld does not answer: ask whoever runs the cluster"
    version = _run("sinfo", "--version").stdout.strip()
    yield Finding("Slurm", answers, version or "commands without a configuration", cure)

    # Accounting records how a job ended after it has left the queue.
    accounting = _run("sacct", "--noheader", "--starttime=now")
    if accounting.returncode == 0:
        yield Finding("accounting", True, "answers")
        return
    lines = accounting.stderr.strip().splitlines()
    yield Finding(
        "accounting",
        False,
        lines[-1] if lines else "does not answer",
        "without it the end of a job is known for some minutes only (MinJobAge): "
        "follow it with --wait",
    )


def _disk(folder: Path) -> Iterator[Finding]:
    # A folder that does not exist yet will be on the disk of the folder around it.
    folder = folder.resolve()
    try:
        while not folder.exists():
            folder = folder.parent
        seconds_off = _clock_difference(folder)
    except OSError as error:
        yield Finding(
            "folder",
            False,
            f"{folder}: {error.strerror}",
            "give a folder that every node may write to",
        )
        return
    # On a cluster, other nodes do not see a folder in memory or in a container.
    kind = _run("stat", "--file-system", "--format=%T", str(folder)).stdout.strip()
    local = shutil.which("sbatch") is not None and kind in ("tmpfs", "overlayfs")
    cure = "other nodes do not see it: give a shared folder" if local else ""
    yield Finding("folder", not local, f"{folder} ({kind})", cure)

    # One student's checkpoints can fill a small disk in the middle of a run.
    free_gib = shutil.disk_usage(folder).free / 2**30
    cure = ""
    if free_gib < _FREE_GIB:
        cure = (
            f"less than {_FREE_GIB} GiB: a student's checkpoints take 12 bytes a parameter, twice"
        )
    yield Finding("space", not cure, f"{free_gib:.0f} GiB free", cure)

    # File times tell which table is newest and which lock is abandoned. The file server sets them.
    right = abs(seconds_off) < _CLOCK_SECONDS
    found = f"{seconds_off:+.1f} s between the folder's server and this machine"
    yield Finding("clock", right, found, "" if right else "start NTP on both")


def _clock_difference(folder: Path) -> float:
    """Write a file, and return how many seconds the clock of the folder's server is ahead."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".post_dist-doctor-") as file:
        # The server sets the file's time when it is flushed, so take our time just before.
        now = time.time()
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
        return os.stat(file.name).st_mtime - now


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_SLURM_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
