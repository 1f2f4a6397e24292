"""Settings of the baseline `published transfer`: the loss and the initial prompt of the paper."""

from post_dist.config.schema import RunConfig
from post_dist.config.stages import PUBLISHED_TRANSFER


def with_published_transfer(config: RunConfig) -> RunConfig:
    """Return the run file with the transfer settings of the paper."""
    changes = {"adapter": "prompt", "lora": None, **PUBLISHED_TRANSFER}
    return config.model_copy(update={"transfer": config.transfer.model_copy(update=changes)})
