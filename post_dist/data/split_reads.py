"""How often a test split has been read: each table that is made of it is a line in a file beside the data."""

import json
from datetime import UTC, datetime
from pathlib import Path

from post_dist.config.sources import Task
from post_dist.files import writing

_NAME = "test_readings.jsonl"


def count_split_read(task: Task, runs: Path, evaluation: str) -> int:
    """Note that an evaluation reads the test split.

    Args:
        task: whose split it is.
        runs: where the file is kept for data that are no local file.
        evaluation: its name; when it is begun again it does not count again.

    Returns:
        How many evaluations have read the split, this one included.

    Raises:
        InputError: the file cannot be written.
    """
    path = task.path.with_name(f"{task.path.name}.{_NAME}") if task.path else runs / _NAME
    with writing(path), path.open("a+") as file:
        file.seek(0)
        known = {json.loads(line)["evaluation"] for line in file}
        if evaluation not in known:
            file.write(
                json.dumps(
                    {
                        "evaluation": evaluation,
                        "at": datetime.now(UTC).isoformat(timespec="seconds"),
                    }
                )
                + "\n"
            )
    return len(known | {evaluation})
