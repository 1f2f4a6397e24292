"""Conflicts: settings of a run file that do not suit each other, the models or the ranks.

Each stage has a pure function `conflicts` in `stages/<stage>/conflicts.py`. It takes the run file,
facts of the models and the layout of the ranks. The stage raises the conflicts that it returns,
`plan` lists them, and `check` prints them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from post_dist.errors import InputError


@dataclass(frozen=True)
class Conflict:
    """A setting that keeps a stage from running.

    Attributes:
        message: what is wrong, usually with the field of the run file.
        hint: what to change.
    """

    message: str
    hint: str = ""

    @property
    def line(self) -> str:
        """The conflict in one line, its hint in parentheses."""
        return f"{self.message} ({self.hint})" if self.hint else self.message


@dataclass(frozen=True)
class Layout:
    """The ranks that a stage runs on.

    Attributes:
        ranks: number of processes in all.
        ranks_per_node: number of processes on each node.
        device: type of the device that each rank uses, `cuda` or `cpu`.
    """

    ranks: int = 1
    ranks_per_node: int = 1
    device: str = "cpu"


def raise_conflicts(stage: str, found: Sequence[Conflict]) -> None:
    """Refuse to run a stage that has conflicts.

    Args:
        stage: name of the stage, for the message.
        found: its conflicts.

    Raises:
        InputError: `found` is not empty; the message holds all of them.
    """
    if not found:
        return
    if len(found) == 1:
        raise InputError(found[0].message, found[0].hint)
    # All conflicts go into one error, so a user can fix them all before the next start.
    lines = []
    for conflict in found:
        hint = f"\n    {conflict.hint}" if conflict.hint else ""
        lines.append(f"  - {conflict.message}{hint}")
    raise InputError(f"{stage}: {len(found)} conflicts\n" + "\n".join(lines))
