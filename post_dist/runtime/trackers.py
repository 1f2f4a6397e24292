"""Trackers: where the public metrics of a provider's run go.

To add one, such as TensorBoard: write a class with a `log` method here, name it in `_trackers`, and
give the run file a field for it. No stage changes. A tracker can only be handed `PublicMetrics`,
which only `open_public_metrics` makes. An import contract keeps private tuning away from this
module; its metrics go through `runtime/private_metrics.py`.
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
        values: each metric by its name; the mapping is read-only.
    """

    step: int
    values: Mapping[str, MetricValue]


class Tracker(Protocol):
    """A place that public metrics are sent to."""

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
    """Open everything that records the public metrics of a run. Rank 0 alone records them.

    Args:
        folder: the run folder; its `config` is the stage's view of the run file.
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
        # Read-only, so that one tracker cannot change what the next one sees.
        metrics = PublicMetrics(step, MappingProxyType(values))
        for tracker in self._trackers:
            tracker.log(metrics)
