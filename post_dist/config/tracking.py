"""The run file's section `tracking`: where public metrics go, besides `metrics.jsonl`."""

from typing import Literal

from post_dist.config.sections import Section

TrackerName = Literal["mlflow", "tensorboard", "trackio", "wandb"]


class Tracking(Section):
    """Trackers of the provider's stages. They get public metrics alone, and the owner's none."""

    to: tuple[TrackerName, ...] = ()
    """Trackers beside `metrics.jsonl`. Each writes files below the folder of the runs: nothing is
    sent anywhere. They need `pip install 'post_dist[track]'`."""
