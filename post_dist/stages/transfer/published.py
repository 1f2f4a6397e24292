"""Settings of the baseline `published transfer`: the loss and the initial prompt of the paper."""

from post_dist.config.schema import RunConfig

_SETTINGS = {
    "adapter": "prompt",
    "lora": None,
    "objective": "published",
    "scores": "vocabulary",
    "temperature": 2.0,
    "match_class_shares": False,
    "trained_share": 0.0,
}


def with_published_transfer(config: RunConfig) -> RunConfig:
    """Return the run file with the transfer settings of the paper."""
    section = config.transfer.model_copy(update=_SETTINGS)
    return config.model_copy(update={"transfer": section})
