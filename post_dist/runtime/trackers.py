"""Trackers record the public metrics of a provider's run.

To add a tracker, such as TensorBoard, write a class with a `log` method here. Add it to `_trackers`
and add a field for it to the run file. No stage changes.

Trackers accept only `PublicMetrics`, which only the record of `open_public_metrics` creates. An
import contract keeps private tuning from importing this module. Its metrics go through
`runtime/private_metrics.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from post_dist.artifacts.run_folder import RunFolder
from post_dist.runtime.distributed import World
from post_dist.runtime.metric_log import MetricLog, MetricRecord, MetricValue


@dataclass(frozen=True)
class PublicMetrics:
    """Metrics of one step of a provider's stage, computed from public data alone.

    Attributes:
        step: number of the step.
        values: the metrics by name, in a read-only mapping.
    """

    step: int
    values: Mapping[str, MetricValue]


class Tracker(Protocol):
    """A destination of public metrics."""

    def log(self, metrics: PublicMetrics) -> None:
        """Record the metrics of one step."""


class JsonLines:
    """Writes `metrics.jsonl` in the run folder."""

    def __init__(self, folder: RunFolder) -> None:
        self._log = MetricLog(folder.path / "metrics.jsonl")

    def log(self, metrics: PublicMetrics) -> None:
        """Append one line."""
        self._log.write(metrics.step, **metrics.values)


def open_public_metrics(folder: RunFolder, world: World) -> MetricRecord:
    """Open all trackers of a run. Only rank 0 records metrics.

    Args:
        folder: the run folder, with the run file's settings.
        world: the ranks.
    """
    return _TrackedRecord(_trackers(folder) if world.is_main else ())


def _trackers(folder: RunFolder) -> list[Tracker]:
    """List the trackers of a run."""
    return [JsonLines(folder)]


class _TrackedRecord:
    """Sends the metrics of each step to all trackers."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def write(self, step: int, **values: MetricValue) -> None:
        """Add the metrics of one step."""
        # The mapping is read-only, so a tracker cannot change what the next one gets.
        metrics = PublicMetrics(step, MappingProxyType(values))
        for tracker in self._trackers:
            tracker.log(metrics)
