"""Metrics of a run as JSON lines, one line for each step. Reports are made from them."""

import json
import time
from pathlib import Path
from typing import Any, Protocol

from post_dist.files import append_line, make_folder, writing

MetricValue = float | int | bool


class MetricRecord(Protocol):
    """The interface to which a training loop writes its metrics."""

    def write(self, step: int, **values: MetricValue) -> None:
        """Add the metrics of one step."""


class MetricLog:
    """Appends to a JSONL file.

    Args:
        path: the file; None to write nothing, on all ranks but rank 0.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._start = time.monotonic()
        if path is not None:
            make_folder(path.parent)

    def write(self, step: int, **values: MetricValue) -> None:
        """Add one line: the step, its metrics, and the seconds since this object was made.

        Raises:
            EnvironmentFault: the disk is full.
        """
        if self._path is None:
            return
        seconds = round(time.monotonic() - self._start, 3)
        line = json.dumps({"seconds": seconds, "step": step, **values})
        # The file is closed after each line, so a killed run loses no metrics.
        with writing(self._path):
            append_line(self._path, line)


def read_metric_log(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file, and keep the last line of each step.

    A run that resumed from a checkpoint may have written some steps twice. A line that a full
    disk has cut is left out.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        by_step[line["step"]] = line
    return list(by_step.values())
