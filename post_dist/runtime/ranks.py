"""How a command, a job or an API call joins the ranks of its launcher, and leaves them."""

import os
from typing import TYPE_CHECKING

from post_dist.config.schema import RunConfig
from post_dist.runtime.watchdog import rest, watch

if TYPE_CHECKING:
    from post_dist.runtime.distributed import World


class _Joined:
    """The ranks that this process has joined, and how long it may stand still among them."""

    world: "World | None" = None
    hang_timeout_seconds = 0.0


def this_rank() -> int:
    """Return the rank that the launcher gave this process; 0 without a launcher. Loads no torch."""
    return int(os.environ.get("RANK") or 0)


def join_ranks(config: RunConfig) -> "World":
    """Load torch, join the other ranks, and start the watchdog.

    A second call in the same process seeds it again and keeps the process group.

    Raises:
        EnvironmentFault: the launcher's variables contradict each other, or there are too few GPUs.
    """
    # Waiting OpenMP threads give up their core instead of spinning on it. Beside one other busy
    # process on two cores, spinning made a tuning step eighteen times slower (15 s against 0.8 s).
    # libgomp reads this variable when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Everything below loads torch.
    from post_dist.runtime.distributed import start
    from post_dist.runtime.logs import speak

    # The watchdog is on before the first collective, in which a missing rank would be waited for.
    limit_seconds = config.engine.hang_timeout_seconds
    speak(this_rank())
    watch(this_rank(), limit_seconds)
    world = start(config.seed)
    _Joined.world = world
    _Joined.hang_timeout_seconds = limit_seconds
    return world


def leave_ranks() -> None:
    """Take the process group down once all ranks are here. Does nothing before `join_ranks`."""
    world = _Joined.world
    if world is None:
        return
    _Joined.world = None
    # A rank that never comes must not be waited for without end.
    watch(world.rank, _Joined.hang_timeout_seconds)
    try:
        world.leave()
    finally:
        rest()
