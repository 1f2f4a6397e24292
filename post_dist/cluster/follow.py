"""Follows jobs to their end. Slurm's word counts, asked twice: a job whose node died is called failed for seconds, and then runs again."""

import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from post_dist.cluster.submit import Submitted
from post_dist.errors import EnvironmentFault

_SECONDS_BETWEEN_LOOKS = 2.0
_LOOKS_TO_BELIEVE = 4
"""So often in a row Slurm must say that a job is over: it calls a job NODE_FAIL for about four seconds before it queues it again."""


@dataclass(frozen=True)
class State:
    """What Slurm says of a job, such as RUNNING or FAILED, where it runs, and its exit code."""

    name: str
    nodes: str = ""
    exit_code: str = ""


def follow(jobs: Iterable[Submitted], say: Callable[[str], None]) -> None:
    """Wait until all jobs are over, and tell each change.

    Raises:
        EnvironmentFault: one of them did not end well.
    """
    failed = [(job, state) for job in jobs if (state := _until_over(job, say)).name != "COMPLETED"]
    if failed:
        job, state = failed[0]
        raise EnvironmentFault(
            f"{job.stage} (job {job.job_id}) ended as {state.name}, exit code {state.exit_code}",
            f"its log: {job.log}",
        )


def _until_over(job: Submitted, say: Callable[[str], None]) -> State:
    told, over = State(""), 0
    while True:
        state, queued = _state(job.job_id)
        over = 0 if queued else over + 1
        if state != told and (queued or over >= _LOOKS_TO_BELIEVE):
            say(
                f"{job.stage} (job {job.job_id}): {state.name}{f' on {state.nodes}' if queued and state.nodes else ''}"
            )
            told = state
        if over >= _LOOKS_TO_BELIEVE and state.name not in (
            "",
            "RUNNING",
            "PENDING",
            "COMPLETING",
        ):  # accounting lags
            return state
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _state(job_id: str) -> tuple[State, bool]:
    """What Slurm says, and whether the job is still in the queue."""
    queue = _ask("squeue", "--noheader", "--jobs", job_id, "--format", "%T|%N")
    if queue:
        name, _, nodes = queue.splitlines()[0].partition("|")
        if name in (
            "PENDING",
            "RUNNING",
            "COMPLETING",
            "REQUEUED",
            "REQUEUE_HOLD",
            "SUSPENDED",
            "CONFIGURING",
            "STOPPED",
            "SIGNALING",
        ):
            return State(name, nodes), True
    for line in _ask(
        "sacct",
        "--allocations",
        "--noheader",
        "--parsable2",
        "--jobs",
        job_id,
        "--format",
        "State,ExitCode",
    ).splitlines():
        name, exit_code = line.split("|")
        return State(name.split()[0], exit_code=exit_code), False
    # Without accounting, slurmctld remembers a job for some minutes.
    fields = dict(
        part.partition("=")[::2]
        for part in _ask("scontrol", "show", "job", "--oneliner", job_id).split()
    )
    return State(fields.get("JobState", ""), exit_code=fields.get("ExitCode", "")), False


def _ask(*command: str) -> str:
    """What a command of Slurm says; nothing when it fails, as squeue does for a job that has left."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
