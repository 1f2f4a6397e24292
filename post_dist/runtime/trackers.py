"""Trackers record the public metrics of a provider's run.

To add a tracker, write a class with a `log` method here, list it in `_KINDS`, and add its name to
`config/tracking.py`. No stage changes. A tracker writes below the folder of the runs, and sends
nothing anywhere.

Trackers accept only `PublicMetrics`, which only the record of `open_public_metrics` creates. An
import contract keeps private tuning from importing this module. Its metrics go through
`runtime/private_metrics.py`.
"""

import atexit
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.tracking import TrackerName
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


class TensorBoard:
    """Writes event files: `tensorboard --logdir runs` shows them."""

    def __init__(self, folder: RunFolder) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder.path / "tensorboard")

    def log(self, metrics: PublicMetrics) -> None:
        """Add the values of one step."""
        for name, value in metrics.values.items():
            self._writer.add_scalar(name, value, metrics.step)
        self._writer.flush()


class WeightsAndBiases:
    """Writes an offline run, which `wandb sync` sends if its owner wants to."""

    def __init__(self, folder: RunFolder) -> None:
        import wandb

        self._run = wandb.init(
            project=folder.config.name,
            name=folder.path.name,
            dir=folder.path,
            mode="offline",
            reinit="create_new",
            settings=wandb.Settings(console="off", x_disable_meta=True, x_disable_stats=True),
        )

    def log(self, metrics: PublicMetrics) -> None:
        """Add the values of one step."""
        self._run.log(dict(metrics.values), step=metrics.step)


class Mlflow:
    """Writes a run into `mlruns` beside the runs: `mlflow ui --backend-store-uri` shows them."""

    def __init__(self, folder: RunFolder) -> None:
        # Its data base would need the server's packages.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        self._client = MlflowClient((folder.path.parent / "mlruns").as_uri())
        name = folder.config.name
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        self._run = self._client.create_run(experiment, run_name=folder.path.name).info.run_id

    def log(self, metrics: PublicMetrics) -> None:
        """Add the values of one step."""
        for name, value in metrics.values.items():
            self._client.log_metric(self._run, name, float(value), step=metrics.step)


class Trackio:
    """Writes into `trackio` beside the runs: `TRACKIO_DIR=... trackio show` shows it."""

    def __init__(self, folder: RunFolder) -> None:
        # trackio reads this when it is imported.
        os.environ.setdefault("TRACKIO_DIR", str(folder.path.parent / "trackio"))
        import trackio

        self._run = trackio.init(project=folder.config.name, name=folder.path.name, embed=False)
        # A thread writes the metrics, so the last ones may still wait when the process ends.
        atexit.register(self._run.finish)

    def log(self, metrics: PublicMetrics) -> None:
        """Add the values of one step."""
        self._run.log(dict(metrics.values), step=metrics.step)


_KINDS: dict[TrackerName, Callable[[RunFolder], Tracker]] = {
    "mlflow": Mlflow,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WeightsAndBiases,
}


def open_public_metrics(folder: RunFolder, world: World) -> MetricRecord:
    """Open all trackers of a run. Only rank 0 records metrics.

    Args:
        folder: the run folder, with the run file's settings.
        world: the ranks.
    """
    return _TrackedRecord(_trackers(folder) if world.is_main else ())


def _trackers(folder: RunFolder) -> list[Tracker]:
    """List the trackers of a run."""
    others = [_KINDS[name](folder) for name in folder.config.tracking.to]
    return [JsonLines(folder), *others]


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
