"""Conflicts: what a run cannot do, stated once.

A stage raises them, `plan` lists them, `check` prints them. Each stage has a pure function
`conflicts` in `stages/<stage>/conflicts.py`. It takes the run file, the facts of the models and the
layout of the ranks, and returns what does not go together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from post_dist.errors import InputError


@dataclass(frozen=True)
class Conflict:
    """Two or more settings that do not go together.

    Attributes:
        message: what is wrong, beginning with the field of the run file.
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
    """How many ranks a stage runs on.

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
    # Several conflicts make one error, so that all of them can be mended before the next start.
    lines = []
    for conflict in found:
        hint = f"\n    {conflict.hint}" if conflict.hint else ""
        lines.append(f"  - {conflict.message}{hint}")
    raise InputError(f"{stage}: {len(found)} conflicts\n" + "\n".join(lines))
