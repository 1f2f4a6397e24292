"""The settings of the row `published transfer`: the paper's loss and start, for the comparison."""

from post_dist.config.schema import RunConfig

_SETTINGS = {
    "objective": "published",
    "scores": "vocabulary",
    "temperature": 2.0,
    "match_class_shares": False,
    "trained_share": 0.0,
}


def with_published_transfer(config: RunConfig) -> RunConfig:
    """Return the run with the paper's transfer, whatever the run file chooses for its own."""
    section = config.transfer.model_copy(update=_SETTINGS)
    return config.model_copy(update={"transfer": section})
