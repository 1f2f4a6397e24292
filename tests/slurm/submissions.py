"""Runs that the tests submit to Slurm, and how they are followed and disturbed."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import tiny
import yaml
from cluster import Cluster, in_time

CLUSTER = {
    "partition": "main",
    "corpus": {"cpus_per_task": 2, "time_minutes": 10},
    "distill": {"nodes": 2, "tasks_per_node": 2, "time_minutes": 10},
    "tune": {"time_minutes": 10},
    "transfer": {"nodes": 2, "time_minutes": 10},
}
SETTINGS = {
    "evaluate": {"baselines": []},
    "distill": {"steps": 6, "batch_size": 4, "checkpoint_every_steps": 50},
    "cluster": CLUSTER,
}


def write_run(folder: Path, **changes: dict) -> Path:
    run = tiny.write_run(folder)
    fields = yaml.safe_load(run.read_text()) | SETTINGS
    for section, values in changes.items():
        fields[section] = fields[section] | values
    run.write_text(yaml.safe_dump(fields))
    return run


def environment(slurm: Cluster) -> dict[str, str]:
    own = slurm.environment
    return own | {"PATH": f"{Path(sys.executable).parent}:{own['PATH']}", "OMP_NUM_THREADS": "1"}


def submit(slurm: Cluster, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "post_dist", "submit", *map(str, arguments)]
    return subprocess.run(
        command, env=environment(slurm), capture_output=True, text=True, timeout=900, check=False
    )


@contextlib.contextmanager
def followed(slurm: Cluster, *arguments: object) -> Iterator[tuple[subprocess.Popen, str]]:
    """A submission that is waited for, and the number of its first job."""
    command = [sys.executable, "-u", "-m", "post_dist", "submit", *map(str, arguments), "--wait"]
    waiting = subprocess.Popen(
        command, env=environment(slurm), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        answer = waiting.stdout.readline()
        assert "job " in answer, waiting.communicate()[1]
        yield waiting, re.search(r"job (\d+)", answer)[1]
    finally:
        waiting.kill()
        waiting.communicate()


def artifact(folder: Path, stage: str) -> Path:
    (found,) = folder.glob(f"runs/tiny/{stage}-????????/artifact")
    return found


def logs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("runs/tiny/slurm/*_log.out")))


def steps_of(folder: Path, stage: str) -> list[int]:
    return [
        json.loads(line)["step"]
        for path in folder.glob(f"runs/tiny/{stage}-????????/*metrics.jsonl")
        for line in path.read_text().splitlines()
    ]


def let_the_time_run_out(slurm: Cluster, job: str, folder: Path) -> None:
    """Lower the time limit of a running job until it is stopped; then give it enough time.

    The work is held still while the time passes, so that even short work is stopped in its middle.
    """
    used = slurm.run("squeue", f"--job={job}", "--noheader", "--Format=TimeUsed").stdout
    minutes, seconds = map(int, used.strip().split(":"))
    # Limits are whole minutes, and Slurm needs some seconds more than the signal's 20.
    limit = minutes + (1 if seconds < 25 else 2)
    slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    ranks = processes_of(slurm, job)
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    told = in_time(lambda: all(map(_has_been_told, ranks)), 150)
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGCONT)
    assert told, logs(folder)
    assert in_time(lambda: "stopped by SIGUSR2" in logs(folder), 30), logs(folder)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")


def _has_been_told(process: int) -> bool:
    """Whether Slurm's signal waits for a process that is held still, or has ended it."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:  # Slurm may wake a process up to tell it
        return True
    pending = int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16)
    return bool(pending >> signal.SIGUSR2 - 1 & 1)


def node_of(slurm: Cluster, job: str) -> str:
    """The last node of a job."""
    nodes = slurm.run("squeue", "--noheader", "--jobs", job, "--format=%N").stdout.strip()
    return slurm.run("scontrol", "show", "hostnames", nodes).stdout.split()[-1]


def write_long_corpus(path: Path, megabytes: int) -> None:
    """Write text that one core needs minutes for."""
    page = " ".join(text for text, _ in tiny.sentences(2000, 3))
    with path.open("w") as file:
        for number in range(megabytes * 1_000_000 // len(page)):
            file.write(f"{number} {page}\n")


def processes_of(slurm: Cluster, job: str, rank: int | None = None) -> list[int]:
    """The processes of a rank or of all ranks, by what Slurm put into their environment."""
    # Another cluster on this machine may have a job with the same number.
    own = f"SLURM_CONF={slurm.environment['SLURM_CONF']}"
    wanted = {own, f"SLURM_JOB_ID={job}", "SUBMITIT_EXECUTOR=slurm"}
    if rank is not None:
        wanted.add(f"SLURM_PROCID={rank}")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            program, *arguments = (process / "cmdline").read_text(errors="replace").split("\0")
            # The arguments of srun are the same.
            is_rank = "submitit.core._submit" in arguments and "python" in Path(program).name
            if is_rank and wanted <= set(
                (process / "environ").read_text(errors="replace").split("\0")
            ):
                found.append(int(process.name))
    return found
