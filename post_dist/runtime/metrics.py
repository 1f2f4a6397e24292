"""`metrics.jsonl`: one line a step, the record from which reports are drawn."""

import json
import time
from pathlib import Path
from typing import Any


class Metrics:
    """Appends to a JSONL file. `path` None keeps nothing: other ranks than the first."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._start = time.monotonic()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **values: Any) -> None:
        """Add one line: the values, and the seconds since this process opened the file."""
        if self._path is not None:
            line = json.dumps({"seconds": round(time.monotonic() - self._start, 3), **values})
            with self._path.open("a") as file:
                file.write(line + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics file; none when it does not exist."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
