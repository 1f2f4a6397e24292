"""Second copies of a rank's checkpoint files, on the own disk of its node."""

import logging
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from post_dist.errors import PostDistError
from post_dist.files import file_digest, write_file
from post_dist.runtime.checkpoint import KEEP
from post_dist.runtime.watchdog import phase

log = logging.getLogger(__name__)


class LocalCopies:
    """The copies of one rank. A restart on the same node reads them in place of the originals.

    A copy is named by its digest, so it belongs to a checkpoint of any earlier layout of the ranks.

    Args:
        folder: the folder of this run's copies; None keeps none.
        rank: this rank. Ranks of a node share the folder.
    """

    def __init__(self, folder: Path | None, rank: int) -> None:
        self._folder = folder
        self._rank = rank

    def keep(self, tensors: dict[str, torch.Tensor], digest: str) -> None:
        """Write a copy, and delete older ones of this rank.

        Args:
            tensors: the contents of the file.
            digest: the digest of the file.
        """
        if self._folder is None:
            return
        copy = self._folder / f"rank{self._rank}-{digest}.safetensors"
        try:
            # With the new copy there are as many as checkpoints. An earlier run may have left more.
            for old in self._own()[: 1 - KEEP]:
                old.unlink()
            write_file(copy, partial(save_file, tensors))
        except (PostDistError, OSError) as error:
            # The checkpoint itself is on the shared storage.
            log.warning("no second copy of the checkpoint on this node: %s", error)

    def find(self, digest: str) -> Path | None:
        """Return an undamaged copy of a file by the file's digest, or None if there is none."""
        for copy in self._named(f"*-{digest}.safetensors"):
            try:
                if file_digest(copy, partial(phase, "reading a copy")) == digest:
                    return copy
                reason = "other contents than were written"
            except OSError as error:
                reason = error
            log.warning("%s is damaged: the original is read (%s)", copy, reason)
        return None

    def clear(self) -> None:
        """Delete this rank's copies, of which a finished run has no use."""
        try:
            for copy in self._own():
                copy.unlink(missing_ok=True)
        except OSError as error:
            log.warning("a copy of a checkpoint stays on this node: %s", error)

    def _own(self) -> list[Path]:
        """Return this rank's copies, the oldest first."""
        own = self._named(f"rank{self._rank}-*.safetensors")
        return sorted(own, key=lambda copy: copy.stat().st_mtime_ns)

    def _named(self, pattern: str) -> list[Path]:
        """Return the copies whose names match a pattern; none if the folder cannot be read."""
        if self._folder is None:
            return []
        try:
            return list(self._folder.glob(pattern))
        except OSError as error:
            log.warning("the copies of checkpoints on this node are not read: %s", error)
            return []
