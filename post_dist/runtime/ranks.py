"""Join the ranks of the launcher for a command, a job or an API call, and leave them again."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from post_dist.config.schema import RunConfig
from post_dist.errors import EnvironmentFault
from post_dist.runtime.launcher import ENVIRONMENT_OF_ONE_PROCESS, end_with_launcher
from post_dist.runtime.watchdog import pause_watchdog, watch

if TYPE_CHECKING:
    from post_dist.runtime.distributed import World


class _Joined:
    """The ranks that this process has joined, and the time limit of its watchdog."""

    world: "World | None" = None
    hang_timeout_seconds = 0.0


_running = threading.Lock()
"""Held while a call of the API runs in this process."""


def this_rank() -> int:
    """Return this process's rank from the launcher, or 0 without one. It does not load torch."""
    # `join_ranks` refuses a rank that is no number.
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


def join_ranks(config: RunConfig) -> "World":
    """Load torch, join the other ranks, and start the watchdog.

    A second call in the same process seeds the process again and keeps the process group.

    Raises:
        EnvironmentFault: the launcher's variables contradict each other, there are too few GPUs, or
            a rank does not come within `engine.join_timeout_seconds`.
    """
    end_with_launcher(os.environ)
    # Waiting OpenMP threads should give up their core instead of spinning. With another busy
    # process on two cores, spinning made a tuning step eighteen times slower (15 s against 0.8 s).
    # libgomp reads this variable when torch is loaded, so it is set before these imports.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from post_dist.runtime.distributed import start
    from post_dist.runtime.logs import configure_logging

    # The watchdog starts before the first collective, which would wait for a missing rank.
    limit_seconds = config.engine.hang_timeout_seconds
    configure_logging(this_rank())
    watch(this_rank(), limit_seconds)
    world = start(config.seed, config.engine.join_timeout_seconds)
    _Joined.world = world
    _Joined.hang_timeout_seconds = limit_seconds
    return world


@contextmanager
def one_call_at_a_time() -> Iterator[None]:
    """Refuse a second call of the API in this process.

    Two calls would share the launcher's variables, the watchdog, and the network that is refused
    while private data are in memory.

    Raises:
        EnvironmentFault: another call runs.
    """
    if not _running.acquire(blocking=False):
        raise EnvironmentFault(
            "another thread of this process runs a stage",
            "call one function of post_dist at a time, or start a process for each",
        )
    try:
        yield
    finally:
        _running.release()


@contextmanager
def joined_ranks(config: RunConfig) -> Iterator["World"]:
    """Join the ranks for a call of the API. At its end, the process is as it was before.

    The process group stays, for the next call.

    Raises:
        EnvironmentFault: any error of `join_ranks`.
    """
    before = {name: os.environ.get(name) for name in ENVIRONMENT_OF_ONE_PROCESS}
    try:
        yield join_ranks(config)
    finally:
        # Otherwise the watchdog would end a notebook that waits between two cells.
        pause_watchdog()
        # A process that is started later, such as `post-dist` from a notebook, would take the
        # variables of a process without a launcher for its own, and join a group that is not.
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def leave_ranks() -> None:
    """Wait for all ranks and destroy the process group. Without `join_ranks` it does nothing."""
    world = _Joined.world
    if world is None:
        return
    _Joined.world = None
    # The watchdog ends the wait for a rank that never comes.
    watch(world.rank, _Joined.hang_timeout_seconds)
    try:
        world.leave()
    finally:
        pause_watchdog()
