"""Follows jobs to their end.

Slurm decides whether a job is over, and is asked several times: a job whose node died is called
failed for some seconds and then runs again.
"""

import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from post_dist.cluster.submit import Submitted
from post_dist.errors import EnvironmentFault

_SECONDS_BETWEEN_LOOKS = 2.0
_LOOKS_TO_BELIEVE = 4
"""How many times in a row a job must be called over.

Slurm calls a job NODE_FAIL for about four seconds before it queues it again.
"""
_IN_QUEUE = {
    "PENDING",
    "RUNNING",
    "COMPLETING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "SUSPENDED",
    "CONFIGURING",
    "STOPPED",
    "SIGNALING",
}
_NOT_OVER = {"", "RUNNING", "PENDING", "COMPLETING"}
"""States that accounting, which lags, still gives for a job that has left the queue."""


@dataclass(frozen=True)
class State:
    """What Slurm says of a job.

    Attributes:
        name: such as RUNNING or FAILED; empty when nothing is known.
        nodes: where it runs.
        exit_code: as Slurm writes it, such as 2:0.
        queued: whether the job is still in the queue.
    """

    name: str
    nodes: str = ""
    exit_code: str = ""
    queued: bool = False


def follow(jobs: Iterable[Submitted], say: Callable[[str], None]) -> None:
    """Wait until all jobs are over.

    Args:
        jobs: in the order in which they are to end.
        say: called with one line for each change of a job's state.

    Raises:
        EnvironmentFault: one of them did not succeed.
    """
    # All jobs are followed to their end, also those that wait for one that has failed.
    failed = []
    for job in jobs:
        state = _until_over(job, say)
        if state.name != "COMPLETED":
            failed.append((job, state))
    if failed:
        job, state = failed[0]
        raise EnvironmentFault(
            f"{job.stage} (job {job.job_id}) ended as {state.name}, exit code {state.exit_code}",
            f"its log: {job.log}",
        )


def _until_over(job: Submitted, say: Callable[[str], None]) -> State:
    """Look at a job until it has been over for several looks in a row; return its last state."""
    told = State("")
    looks_over = 0
    while True:
        # One look that finds the job in the queue starts the count again.
        state = _state(job.job_id)
        looks_over = 0 if state.queued else looks_over + 1
        believed = looks_over >= _LOOKS_TO_BELIEVE
        # An end is told when it is believed, and every other change at once.
        if state != told and (state.queued or believed):
            say(f"{job.stage} (job {job.job_id}): {_place(state)}")
            told = state
        if believed and state.name not in _NOT_OVER:
            return state
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _place(state: State) -> str:
    if state.queued and state.nodes:
        return f"{state.name} on {state.nodes}"
    return state.name


def _state(job_id: str) -> State:
    """Ask the queue, then accounting, then the controller's memory."""
    # The queue is the newest source, and knows only what is not over.
    queue = _ask("squeue", "--noheader", "--jobs", job_id, "--format", "%T|%N")
    if queue:
        name, _, nodes = queue.splitlines()[0].partition("|")
        if name in _IN_QUEUE:
            return State(name, nodes, queued=True)

    # Accounting keeps what is over, and may lag some seconds behind.
    columns = ["--allocations", "--noheader", "--parsable2", "--format", "State,ExitCode"]
    accounted = _ask("sacct", *columns, "--jobs", job_id)
    if accounted:
        name, exit_code = accounted.splitlines()[0].split("|")
        return State(name.split()[0], exit_code=exit_code)

    # Without accounting, slurmctld remembers a job for some minutes.
    fields = {}
    for part in _ask("scontrol", "show", "job", "--oneliner", job_id).split():
        name, _, value = part.partition("=")
        fields[name] = value
    return State(fields.get("JobState", ""), exit_code=fields.get("ExitCode", ""))


def _ask(*command: str) -> str:
    """Return the output of a Slurm command; empty when it fails, as for a job that has left."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
