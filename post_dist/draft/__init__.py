"""A run file for the owner of a table of labeled texts: `post-dist init --data`."""

from post_dist.draft.columns import Columns
from post_dist.draft.run_file import draft_run

__all__ = ["Columns", "draft_run"]
