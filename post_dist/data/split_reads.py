"""Count how many evaluations have read a test split, in a file next to the data."""

import json
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from post_dist.config.sources import Task
from post_dist.files import append_line, writing

_NAME = "test_readings.jsonl"


def count_split_read(task: Task, runs: Path, evaluation: str) -> int:
    """Record that an evaluation reads the test split.

    Args:
        task: the task whose split it is.
        runs: folder for the record if the data are not a local file.
        evaluation: name of the evaluation. Each name counts once, even if it starts again.

    Returns:
        The number of evaluations that have read the split, including this one.

    Raises:
        InputError: the record cannot be written.
    """
    # All runs on a local file share one count, so it is stored next to the file.
    path = runs / _NAME
    if task.path:
        path = task.path.with_name(f"{task.path.name}.{_NAME}")
    with writing(path):
        known = _evaluations(path)
        if evaluation not in known:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            append_line(path, json.dumps({"evaluation": evaluation, "at": now}))
    return len(known | {evaluation})


def _evaluations(path: Path) -> set[str]:
    """Return the names of the evaluations in a record."""
    found = set()
    for line in path.read_bytes().splitlines() if path.exists() else []:
        # A full disk, or the end of a process, may have cut a line.
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            found.add(str(json.loads(line)["evaluation"]))
    return found
