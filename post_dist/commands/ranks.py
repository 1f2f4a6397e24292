"""What a command does first that needs torch: join the other ranks of its launcher."""

import os
from typing import TYPE_CHECKING

from post_dist.config.schema import RunConfig
from post_dist.runtime.watchdog import watch

if TYPE_CHECKING:
    from post_dist.runtime.distributed import World


def start_ranks(config: RunConfig) -> "World":
    """Load torch and join the other ranks."""
    # Waiting OpenMP threads give up their core instead of spinning on it: beside one other busy process on two cores,
    # spinning made a tuning step eighteen times slower (15 s against 0.8 s). libgomp reads this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from post_dist.runtime.distributed import start
    from post_dist.runtime.logs import speak

    speak(_rank())
    watch(_rank(), config.engine.hang_timeout_seconds)
    return start(config.seed)


def _rank() -> int:
    return int(os.environ.get("RANK") or 0)
