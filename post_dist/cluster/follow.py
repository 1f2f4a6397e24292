"""Follow jobs to their end.

If a node dies, Slurm reports its job as failed for some seconds, and then runs the job again. So a
job counts as over only after several such answers in a row.
"""

import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from post_dist.cluster.submit import Submitted
from post_dist.errors import EnvironmentFault

_POLL_SECONDS = 2.0
_CONFIRMING_POLLS = 4
"""Number of times in a row that Slurm must report a job as over.

Slurm reports NODE_FAIL for about four seconds before it queues the job again.
"""
_UNKNOWN_POLLS = 60
"""Number of times in a row that Slurm must not know a job."""
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
"""States that accounting may still report for a job that has left the queue, because it lags."""


@dataclass(frozen=True)
class State:
    """The state of a job, as Slurm reports it.

    Attributes:
        name: the state, such as RUNNING or FAILED; empty if Slurm does not know the job.
        nodes: the nodes that the job runs on.
        exit_code: the exit code as Slurm writes it, such as 2:0.
        queued: whether the job is still in the queue.
    """

    name: str
    nodes: str = ""
    exit_code: str = ""
    queued: bool = False


def follow(jobs: Iterable[Submitted], say: Callable[[str], None]) -> None:
    """Wait until all jobs are over.

    Args:
        jobs: the jobs, in the order in which they should end.
        say: called with one line for each change of a job's state.

    Raises:
        EnvironmentFault: a job did not succeed.
    """
    # Follow every job to its end, even a job that depends on a failed one.
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
    """Poll a job until it was over several times in a row, and return its last state."""
    reported = State("")
    polls_over = 0
    polls_unknown = 0
    while True:
        # If the job is back in the queue, the count starts again.
        state = _state(job.job_id)
        polls_over = 0 if state.queued else polls_over + 1
        # Without accounting, Slurm forgets a job some minutes after its end.
        polls_unknown = 0 if state.name else polls_unknown + 1
        if polls_unknown >= _UNKNOWN_POLLS:
            return State("UNKNOWN", exit_code="unknown")
        confirmed = polls_over >= _CONFIRMING_POLLS
        # Report an end only when it is confirmed, and every other change at once.
        if state != reported and (state.queued or confirmed):
            say(f"{job.stage} (job {job.job_id}): {_place(state)}")
            reported = state
        if confirmed and state.name not in _NOT_OVER:
            return state
        time.sleep(_POLL_SECONDS)


def _place(state: State) -> str:
    if state.queued and state.nodes:
        return f"{state.name} on {state.nodes}"
    return state.name


def _state(job_id: str) -> State:
    """Return the state of a job by the queue, by accounting, or by the controller's memory."""
    # The queue is the most recent source, but knows only jobs that are not over.
    queue = _ask("squeue", "--noheader", "--jobs", job_id, "--format", "%T|%N")
    if queue:
        name, _, nodes = queue.splitlines()[0].partition("|")
        if name in _IN_QUEUE:
            return State(name, nodes, queued=True)

    # Accounting keeps finished jobs, and may lag some seconds behind.
    columns = ["--allocations", "--noheader", "--parsable2", "--format", "State,ExitCode"]
    accounted = _ask("sacct", *columns, "--jobs", job_id)
    if accounted:
        name, exit_code = accounted.splitlines()[0].split("|")
        return State(name.split()[0], exit_code=exit_code)

    # Without accounting, slurmctld remembers a finished job for some minutes.
    fields = {}
    for part in _ask("scontrol", "show", "job", "--oneliner", job_id).split():
        name, _, value = part.partition("=")
        fields[name] = value
    return State(fields.get("JobState", ""), exit_code=fields.get("ExitCode", ""))


def _ask(*command: str) -> str:
    """Return the output of a Slurm command; empty if it fails, as for an unknown job."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
