"""Metrics of private data, which stay in the owner's run folder.

They cannot reach a tracker. Trackers accept only `PublicMetrics`, and this module creates none.
"""

from post_dist.artifacts.run_folder import RunFolder
from post_dist.runtime.distributed import World
from post_dist.runtime.metric_log import MetricLog, MetricRecord


def open_private_metrics(folder: RunFolder, world: World) -> MetricRecord:
    """Open `private_metrics.jsonl` in the run folder. Rank 0 alone writes it.

    Args:
        folder: the run folder, which only the owner can read.
        world: the ranks.
    """
    return MetricLog(folder.path / "private_metrics.jsonl" if world.is_main else None)
