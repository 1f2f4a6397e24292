"""Metrics of a run as JSON lines, one line for each step. Reports are made from them."""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from post_dist.files import append_line, make_folder, writing

MetricValue = float | int | bool
MetricLine = Mapping[str, MetricValue]
"""A line of a metrics file: `step`, `seconds` since the start of its process, and the metrics."""
MOST_STEPS = 10**12


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


def read_metric_log(path: Path) -> list[MetricLine]:
    """Read a metrics file, and keep the last line of each step.

    A run that resumed from a checkpoint may have written some steps twice.
    """
    by_step = {line["step"]: line for line in metric_lines(path.read_bytes().split(b"\n"))}
    return list(by_step.values())


def metric_lines(texts: Iterable[bytes]) -> Iterator[MetricLine]:
    """Yield the lines of a metrics file, which may come from others.

    A line that a full disk has cut, that is half written, or that no run writes is left out.
    """
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and _is_written(line):
            yield line


def _is_written(line: Mapping[str, Any]) -> bool:
    """Return whether a run writes such a line. A loss may be infinite, or no number."""
    step = line.get("step")
    if type(step) is not int or not 0 <= step <= MOST_STEPS:
        return False
    for value in line.values():
        # Python reads integers that no float holds.
        is_number = isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63)
        if not is_number:
            return False
    return math.isfinite(line.get("seconds", math.nan))
