"""Count how often a test split has been read: one line for each evaluation, beside the data."""

import json
from datetime import UTC, datetime
from pathlib import Path

from post_dist.config.sources import Task
from post_dist.files import writing

_NAME = "test_readings.jsonl"


def count_split_read(task: Task, runs: Path, evaluation: str) -> int:
    """Record that an evaluation reads the test split.

    Args:
        task: the task whose split it is.
        runs: folder for the record of data that are not a local file.
        evaluation: name of the evaluation. If it starts again, it does not count again.

    Returns:
        How many evaluations have read the split, this one included.

    Raises:
        InputError: the record cannot be written.
    """
    # Beside a local file, all runs on it share the count.
    path = runs / _NAME
    if task.path:
        path = task.path.with_name(f"{task.path.name}.{_NAME}")
    with writing(path), path.open("a+") as file:
        # The mode is for appending, so reading starts at the end unless moved.
        file.seek(0)
        known = {json.loads(line)["evaluation"] for line in file}
        if evaluation not in known:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            file.write(json.dumps({"evaluation": evaluation, "at": now}) + "\n")
    return len(known | {evaluation})
