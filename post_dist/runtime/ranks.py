"""Join the ranks of the launcher for a command, a job or an API call, and leave them again."""

import os
from typing import TYPE_CHECKING

from post_dist.config.schema import RunConfig
from post_dist.runtime.launcher import end_with_launcher
from post_dist.runtime.watchdog import pause_watchdog, watch

if TYPE_CHECKING:
    from post_dist.runtime.distributed import World


class _Joined:
    """The ranks that this process has joined, and the time limit of its watchdog."""

    world: "World | None" = None
    hang_timeout_seconds = 0.0


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
