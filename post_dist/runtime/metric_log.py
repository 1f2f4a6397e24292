"""`metrics.jsonl`: one line a step, the record from which reports are drawn."""

import json
import time
from pathlib import Path
from typing import Any


class MetricLog:
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


def read_metric_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, the last one of each step: a run that went on from a checkpoint wrote some twice."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return list({line["step"]: line for line in lines}.values())
