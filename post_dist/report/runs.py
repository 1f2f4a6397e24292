"""Runs on disk, for `ls` and `status`: which there are, and how far each one is.

Only files that a run writes anyway are read. Of a run on private data, the step of its checkpoint
is the only progress that is read: times of its steps would tell the sizes of its batches.

A folder may come from another party. Then its files may hold anything, and what is no number of
steps or seconds is not shown.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from post_dist.artifacts.manifest import FILE_NAME
from post_dist.artifacts.run_folder import SETTINGS, is_finished
from post_dist.config.schema import STAGE_SECTIONS, Stage
from post_dist.errors import InputError
from post_dist.paths import kind_of
from post_dist.report.lineage import listed_claim, manifest_of, settings_of, steps_of
from post_dist.runtime.checkpoint_folders import checkpoint_folders, step_of
from post_dist.runtime.metric_log import MOST_STEPS, MetricLine, metric_lines

_TAIL_BYTES = 1 << 16
_SILENT_SECONDS = 60.0
_SILENT_STEPS = 10
"""A run that has written nothing for this long may have ended, so no time left is given."""


@dataclass(frozen=True)
class FoundRun:
    """The run of a stage, or an artifact without its run.

    Attributes:
        stage: name of the stage, or kind of the artifact.
        state: `finished` or `unfinished`.
        epsilon: epsilon that a private prompt claims in a file of its manifest; otherwise None.
        date: time of the artifact, or of the start of an unfinished run, in UTC.
        path: its folder.
    """

    stage: str
    state: str
    epsilon: float | None
    date: str
    path: str


@dataclass(frozen=True)
class RunProgress:
    """Progress of the run of a stage.

    Attributes:
        run: name of its folder.
        state: `finished` or `unfinished`.
        step: number of steps done; None if it is not known.
        steps: number of all steps; None if the stage has none.
        steps_per_second: speed of the last steps.
        seconds_left: estimate of the time left; None if the run may have ended.
        seconds_since_write: age of the newest metrics; None on private data.
    """

    run: str
    state: str
    step: int | None = None
    steps: int | None = None
    steps_per_second: float | None = None
    seconds_left: float | None = None
    seconds_since_write: float | None = None


def runs_below(folder: Path) -> list[FoundRun]:
    """Find the runs and artifacts below a folder, the oldest first.

    Raises:
        InputError: there is no such folder.
    """
    found = [_found(path) for path in run_folders(folder)]
    return sorted(found, key=lambda run: (run.date, run.path))


def progress_below(folder: Path) -> list[RunProgress]:
    """Tell how far each stage of a run is, the oldest first.

    Args:
        folder: the folder of a run, such as `runs/demo`, or of one of its stages.

    Raises:
        InputError: it holds no run.
    """
    runs = [Path(run.path) for run in runs_below(folder)]
    progress = [_progress(path) for path in runs if (path / SETTINGS).is_file()]
    if not progress:
        raise InputError(f"{folder} holds no run", "`post-dist ls` lists the runs below a folder")
    return progress


def run_folders(folder: Path) -> list[Path]:
    """Find the folders of runs and of artifacts. They are not searched for more.

    Raises:
        InputError: there is no such folder.
    """
    if kind_of(folder) != "folder":
        raise InputError(f"{folder} is not a folder", "give the folder of your runs")
    found = []
    for place, inner, files in os.walk(folder):
        is_run = SETTINGS in files and (Path(place) / SETTINGS).is_file()
        if is_run or FILE_NAME in files:
            inner.clear()
            found.append(Path(place))
        # Hidden folders hold half-written artifacts and environments of Python.
        inner[:] = [name for name in inner if not name.startswith(".")]
    return found


def _found(path: Path) -> FoundRun:
    """Describe the folder of a run, or of an artifact."""
    is_run = (path / SETTINGS).is_file()
    artifact = path / "artifact" if is_run else path
    manifest = artifact / FILE_NAME
    finished = manifest.is_file() or is_finished(path)
    epsilon = listed_claim(artifact).get("epsilon")
    dated = manifest if manifest.is_file() else path / SETTINGS
    return FoundRun(
        stage=_stage(path.name) or path.name if is_run else _kind(manifest),
        state="finished" if finished else "unfinished",
        epsilon=epsilon if isinstance(epsilon, float) else None,
        date=_date(dated),
        path=str(path),
    )


def _date(path: Path) -> str:
    """Return the time of a file in UTC; empty if it has none that a calendar knows."""
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    except (OSError, ValueError, OverflowError):
        return ""


def _stage(name: str) -> Stage | None:
    """Return the stage that the name of a folder, such as `tune-target-1f2e3d4c`, begins with."""
    stage = name.partition("-")[0]
    return next((known for known in STAGE_SECTIONS if known == stage), None)


def _kind(manifest: Path) -> str:
    """Return the kind that a manifest of others names."""
    known = manifest_of(manifest.parent)
    return "unknown artifact" if known is None else known.kind


def _progress(path: Path) -> RunProgress:
    """Read how far the run in a folder is."""
    if is_finished(path):
        return RunProgress(path.name, "finished")
    stage = _stage(path.name)
    settings = settings_of(path)
    steps = _whole(steps_of(stage or "", _section(settings, stage or "")))
    if stage is None or steps is None:
        return RunProgress(path.name, "unfinished")
    if "private_task" in STAGE_SECTIONS[stage]:
        return _private_progress(path, settings, steps)
    return _public_progress(path, steps)


def _private_progress(path: Path, settings: Mapping[str, Any], steps: int) -> RunProgress:
    """Read the step of the newest checkpoint, and nothing of a search.

    Args:
        path: the folder of the run.
        settings: its settings.
        steps: number of steps without a privacy plan.
    """
    # The number of a search's trials is private, and so is everything that tells it.
    if _section(settings, "tune").get("search") is not None:
        return RunProgress(path.name, "unfinished")
    planned = _whole(_section(settings, "privacy").get("steps")) or steps
    return RunProgress(path.name, "unfinished", step=_checkpoint(path), steps=planned)


def _public_progress(path: Path, steps: int) -> RunProgress:
    """Read step and speed from the last lines of the metrics."""
    metrics = path / "metrics.jsonl"
    lines = _last_lines(metrics) if metrics.is_file() else []
    if not lines:
        return RunProgress(path.name, "unfinished", step=_checkpoint(path), steps=steps)
    done = int(lines[-1]["step"]) + 1
    silent = max(time.time() - metrics.stat().st_mtime, 0.0)
    speed = _speed(lines)
    left = None
    if speed is not None and silent < max(_SILENT_SECONDS, _SILENT_STEPS / speed):
        left = max((steps - done) / speed - silent, 0.0)
    return RunProgress(path.name, "unfinished", done, steps, speed, left, silent)


def _checkpoint(path: Path) -> int:
    """Return the step of the newest checkpoint, or 0 without one."""
    newest_first = checkpoint_folders(path / "checkpoints")
    return step_of(newest_first[0]) if newest_first else 0


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a section of settings; empty if it is missing or something else."""
    section = settings.get(name)
    return section if isinstance(section, dict) else {}


def _whole(value: object) -> int | None:
    """Return a value if it is a number of steps."""
    # True and False do not count as numbers.
    return value if type(value) is int and 0 <= value <= MOST_STEPS else None


def _last_lines(path: Path) -> list[MetricLine]:
    """Read the last lines of a metrics file that one process has written."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
        texts = file.read().split(b"\n")
    lines: list[MetricLine] = []
    # The first line may be cut, and the last one may be half written.
    for line in metric_lines(texts):
        # The clock starts again when a run resumes.
        if lines and line["seconds"] < lines[-1]["seconds"]:
            lines.clear()
        lines.append(line)
    return lines


def _speed(lines: Sequence[MetricLine]) -> float | None:
    """Return the steps per second of these lines, or None if they are too few."""
    seconds = lines[-1]["seconds"] - lines[0]["seconds"]
    steps = lines[-1]["step"] - lines[0]["step"]
    # Numbers of others may give zero or infinity.
    speed = steps / seconds if seconds > 0 else 0.0
    return speed if 0 < speed < math.inf else None
