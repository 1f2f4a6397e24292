"""Ends a process that has stood still for too long, and says where it stood.

When one rank dies or hangs, the others wait in a collective for ever, and a cluster is paid for nothing. Every phase of the work
reports here; when none has for the limit, the process names its rank and phase, shows the stacks of its threads, and exits.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from post_dist.errors import EnvironmentFault

log = logging.getLogger(__name__)

_LOOKS_A_LIMIT = 10


class _Watch:
    """What the watching thread looks at."""

    phase = "starting"
    moved = time.monotonic()
    paused = False
    thread: threading.Thread | None = None


def watch(rank: int, limit_seconds: float) -> None:
    """Watch this process from now on; one thread does it, however often this is called."""
    phase("starting")
    _Watch.paused = False
    if _Watch.thread is None:
        _Watch.thread = threading.Thread(
            target=_look, args=(rank, limit_seconds), daemon=True, name="watchdog"
        )
        _Watch.thread.start()


def rest() -> None:
    """Stop watching: the command is over."""
    _Watch.paused = True


def phase(name: str) -> None:
    """Say what this process does now, and that it moves."""
    _Watch.phase, _Watch.moved = name, time.monotonic()


@contextmanager
def unwatched(name: str) -> Iterator[None]:
    """For a wait that may be as long as another rank's work, or as a network is slow."""
    phase(name)
    before, _Watch.paused = _Watch.paused, True
    try:
        yield
    finally:
        _Watch.paused = before
        phase(name)


def _look(rank: int, limit_seconds: float) -> None:
    while True:
        time.sleep(limit_seconds / _LOOKS_A_LIMIT)
        if _Watch.paused or time.monotonic() - _Watch.moved < limit_seconds:
            continue
        fault = EnvironmentFault(
            f"rank {rank} has stood still for {limit_seconds:g} s in: {_Watch.phase}",
            "look for a rank that has died or hangs; the same command goes on from the last checkpoint",
        )
        log.error("%s", fault)  # into the rank's own file too
        print(f"post-dist: {fault}", file=sys.stderr)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        sys.stderr.flush()
        os._exit(EnvironmentFault.exit_code)
