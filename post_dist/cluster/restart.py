"""Decide whether a failed job is worth another start. The batch script calls it at its end.

    python -m post_dist.cluster.restart EXIT_CODE

The exit code is 0 if the job should be queued again. Every failure is recorded in the folder of the
job's logs, with the step that the run had reached. The same failure twice at the same step would
come a third time.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from post_dist.errors import InputError
from post_dist.report.runs import progress_below
from post_dist.runtime.launcher import FINAL_EXIT_CODES

_MOST_RESTARTS = 10
_SAME_FAILURE = 2
"""Number of equal failures at the same step that end a job."""
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
    if exit_code == 0 or exit_code in FINAL_EXIT_CODES:
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
        step = _step(folder.parent, stage)
    failure = Failure(time.time(), exit_code, step, _reason(folder, job, since))
    with record.open("a") as file:
        file.write(json.dumps(asdict(failure)) + "\n")
    most = int(environment.get("POST_DIST_MAX_RESTARTS", _MOST_RESTARTS))
    return _verdict([*earlier, failure], most)


def _verdict(failures: list[Failure], most: int) -> tuple[bool, str]:
    """Decide by all failures of a job, the last one included."""
    last = failures[-1]
    place = "" if last.step is None else f" at step {last.step}"
    told = f"exit code {last.exit_code}{place}"
    if last.reason:
        told += f" ({last.reason})"
    # A rank that hangs, and then one that starts too slowly, are not the same failure.
    kinds = [(failure.exit_code, failure.step, failure.reason) for failure in failures]
    if last.step is not None and kinds[-_SAME_FAILURE:].count(kinds[-1]) == _SAME_FAILURE:
        return False, f"not restarted: {told}, for the second time at the same step"
    if len(failures) > most:
        return False, f"not restarted: {told}, after {most} restarts"
    return True, f"restart {len(failures)} of {most}: {told}"


def _read(record: Path) -> list[Failure]:
    if not record.exists():
        return []
    return [Failure(**json.loads(line)) for line in record.read_text().splitlines()]


def _step(folder: Path, stage: str) -> int:
    """Return the number of steps that the newest run of a stage has done.

    It is 0 for a stage without steps, such as `evaluate`. Nothing else tells whether such a stage
    has come further than before. Of `signals`, the files that all workers have written are counted.
    """
    if stage == "signals":
        # With `distill.cache_gib`, files that the student has read are removed. It says how many.
        read = sum(int(file.read_text()) for file in folder.glob("teacher-signals-*/first"))
        return read + sum(1 for _ in folder.glob("teacher-signals-*/*/[0-9]*.safetensors"))
    try:
        runs = progress_below(folder)
    except (InputError, OSError):
        return 0
    steps = [run.step for run in runs if run.run.startswith(f"{stage}-")]
    return (steps[-1] or 0) if steps else 0


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
    """Print the decision, and return the exit code that tells it."""
    again, told = decide(int(sys.argv[1]), os.environ)
    if told:
        print(f"{_MESSAGE}{told}", flush=True)
    return 0 if again else 1


if __name__ == "__main__":
    sys.exit(main())
