"""A request to stop, from Slurm before a time limit (SIGUSR2) or from whoever ends a job (SIGTERM).

The signal only sets a flag. All ranks look at it together between two steps, save, and leave with exit code 6, so that the same
command goes on from there.
"""

import signal
from types import FrameType
from typing import TYPE_CHECKING

from post_dist.errors import Interrupted

if TYPE_CHECKING:  # it loads torch, and signals may come before that
    from post_dist.runtime.distributed import World

_requested: list[str] = []


def listen() -> None:
    """Take SIGTERM and SIGUSR2 as requests to stop."""
    _requested.clear()
    for name in ("SIGTERM", "SIGUSR2"):
        signal.signal(getattr(signal, name), _request)


def leave_quietly() -> None:
    """It is decided how this process ends, and from now on no request changes that.

    Slurm, told that one task has left, ends the others, and one that dies of it would hide the exit code of all.
    """
    for name in ("SIGTERM", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def stop_requested(world: "World") -> bool:
    """Whether any rank was asked to stop; all ranks call it, and hear the same."""
    return world.any(bool(_requested))


def stopped(what: str) -> Interrupted:
    """The error to leave with once everything is saved."""
    by = f" by {_requested[0]}" if _requested else ""
    return Interrupted(f"stopped{by}: {what}", "the same command goes on from there")


def _request(number: int, frame: FrameType | None) -> None:
    _requested.append(signal.Signals(number).name)
