"""Decide whether a job that has ended is worth another start. The batch script calls it.

    python -m post_dist.cluster.restart EXIT_CODE

The exit code is 0 if the job should be queued again, and 2 if not. Every failure and time limit is
recorded in the folder of the job's logs, with the step that the run had reached. The same failure
twice at the same step would come a third time.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from post_dist.artifacts.run_folder import ENVIRONMENT
from post_dist.artifacts.strict_json import dataclass_of, parse_object, read_small
from post_dist.errors import EnvironmentFault, InputError, Interrupted
from post_dist.files import append_line
from post_dist.report.runs import RunProgress, progress_below
from post_dist.runtime.launcher import FINAL_EXIT_CODES
from post_dist.stages.distill.first_read import read_first

_MOST_RESTARTS = 10
_SAME_FAILURE = 2
"""Number of equal failures at the same step that end a job."""
_SAME_LIMIT = 3
"""Number of time limits at the same step that end a job."""
_NOT_AGAIN = 2
"""Exit code for a job that should not be queued again. If this program fails, Python's is 1."""
_TAIL_BYTES = 1 << 16
_MESSAGE = "post-dist: "
_OWN_MESSAGES = (f"{_MESSAGE}restart ", f"{_MESSAGE}not restarted: ")


@dataclass(frozen=True)
class Failure:
    """A failure of a job.

    Attributes:
        time: seconds since 1970.
        exit_code: exit code of srun: that of a rank, or 128 and the number of its signal.
        step: number of steps that the stage had done, or of files of signals; None for a job that
            is not `submit`'s.
        reason: the last message of a rank in its log; empty if none has written one.
    """

    time: float
    exit_code: int
    step: int | None
    reason: str


def decide(exit_code: int, environment: Mapping[str, str]) -> tuple[bool, str]:
    """Record a failure, and decide whether the job should be queued again.

    Args:
        exit_code: exit code of srun.
        environment: `SLURM_JOB_ID` and `SLURM_JOB_NAME`; the ids of its array, if it is in one;
            `POST_DIST_JOB_FOLDER`, the folder of the logs, and `POST_DIST_MAX_RESTARTS` if the job
            has them.

    Returns:
        The decision, and a line that explains it; empty for a job that did not fail.
    """
    in_time = exit_code == Interrupted.exit_code
    if exit_code == 0 or (exit_code in FINAL_EXIT_CODES and not in_time):
        return False, ""
    folder = Path(environment.get("POST_DIST_JOB_FOLDER", "."))
    job = environment["SLURM_JOB_ID"]
    # Each job of an array has logs and restarts of its own.
    if "SLURM_ARRAY_JOB_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    record = folder / f"{job}_failures.jsonl"
    earlier = _read(record)
    since = earlier[-1].time if earlier else 0.0
    step = None
    # The logs of a submitted job are in the run's own folder. Others may be anywhere.
    if "POST_DIST_JOB_FOLDER" in environment:
        stage = environment["SLURM_JOB_NAME"].removeprefix("post_dist-")
        step = _step(folder.parent, stage, environment["SLURM_JOB_ID"])
    reason = "" if in_time else _reason(folder, job, since)
    failure = Failure(time.time(), exit_code, step, reason)
    most = int(environment.get("POST_DIST_MAX_RESTARTS", _MOST_RESTARTS))
    try:
        append_line(record, json.dumps(asdict(failure)))
    except OSError as error:
        unwritten = f"{record} cannot be written: {error.strerror}"
        # Without the record nobody would count the restarts. What was saved goes on.
        return in_time, unwritten if in_time else f"not restarted: {unwritten}"
    ends = [*earlier, failure]
    if in_time:
        return _verdict_on_limits(ends, most)
    return _verdict([end for end in ends if end.exit_code != Interrupted.exit_code], most)


def _verdict_on_limits(ends: list[Failure], most: int) -> tuple[bool, str]:
    """Decide about a job that has saved because its time was up.

    Args:
        ends: all ends of the job, this one included.
        most: largest number of restarts of a job that fails.
    """
    last = ends[-1]
    at_this_step = 0
    for end in reversed(ends):
        if (end.exit_code, end.step) != (last.exit_code, last.step):
            break
        at_this_step += 1
    # Nothing tells how far a stage without steps has come. It is always at step 0.
    if at_this_step < (_SAME_LIMIT if last.step else max(most, _SAME_LIMIT)):
        return True, ""
    return False, (
        f"not restarted: the time limit has come {at_this_step} times{_place(last)}; "
        "raise time_minutes"
    )


def _verdict(failures: list[Failure], most: int) -> tuple[bool, str]:
    """Decide by all failures of a job, the last one included."""
    last = failures[-1]
    cause = f"exit code {last.exit_code}{_place(last)}"
    if last.reason:
        cause += f" ({last.reason})"
    # A rank that hangs, and then one that starts too slowly, are not the same failure.
    kinds = [(failure.exit_code, failure.step, failure.reason) for failure in failures]
    if last.step is not None and kinds[-_SAME_FAILURE:].count(kinds[-1]) == _SAME_FAILURE:
        return False, f"not restarted: {cause}, for the second time at the same step"
    if len(failures) > most:
        return False, f"not restarted: {cause}, after {most} restarts"
    return True, f"restart {len(failures)} of {most}: {cause}"


def _place(failure: Failure) -> str:
    return "" if failure.step is None else f" at step {failure.step}"


def _read(record: Path) -> list[Failure]:
    if not record.exists():
        return []
    failures = []
    for line in record.read_text(errors="replace").splitlines():
        # A full disk may have cut a line.
        with contextlib.suppress(ValueError):
            failures.append(dataclass_of(Failure, parse_object(line.encode())))
    return failures


def _step(folder: Path, stage: str, job: str) -> int:
    """Return the number of steps that a job has done of its stage.

    It is 0 for a stage without steps, such as `evaluate`. Nothing else tells whether such a stage
    has come further than before. Of `signals`, the files that all workers have written are counted.
    """
    if stage == "signals":
        # With `distill.cache_gib`, files that the student has read are removed. It says how many.
        read = sum(_first_read(signals) for signals in folder.glob("teacher-signals-*"))
        return read + sum(1 for _ in folder.glob("teacher-signals-*/*/[0-9]*.safetensors"))
    try:
        runs = progress_below(folder)
    except (InputError, OSError):
        return 0
    # Runs with other settings lie beside those of this job.
    own = [run for run in runs if run.run.startswith(f"{stage}-") and _job_of(folder, run) == job]
    return sum(run.step or 0 for run in own)


def _first_read(signals: Path) -> int:
    """Return how many files of a folder of signals the student has read; 0 if nothing tells it."""
    try:
        return read_first(signals)
    except EnvironmentFault:
        # The stage itself names the damaged file.
        return 0


def _job_of(folder: Path, run: RunProgress) -> str | None:
    """Return the number of the job in which the newest start of a run took place."""
    try:
        job = read_small(folder / run.run / ENVIRONMENT).get("slurm_job")
    except (OSError, ValueError):
        return None
    return job if isinstance(job, str) else None


def _reason(folder: Path, job: str, since: float) -> str:
    """Return the last message of the first task that has written one in this start."""
    for log in sorted(folder.glob(f"{job}_*_log.out")):
        if log.stat().st_mtime < since:
            continue
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - _TAIL_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
        messages = [line for line in lines if line.startswith(_MESSAGE)]
        # This program ends the messages of an earlier start with a line of its own.
        if messages and not messages[-1].startswith(_OWN_MESSAGES):
            return messages[-1].removeprefix(_MESSAGE)
    return ""


def main() -> int:
    """Print the decision, and return the exit code that stands for it."""
    again, message = decide(int(sys.argv[1]), os.environ)
    if message:
        print(f"{_MESSAGE}{message}", flush=True)
    return 0 if again else _NOT_AGAIN


if __name__ == "__main__":
    sys.exit(main())
