"""End a process that has made no progress for too long, and report where it was.

When one rank dies or hangs, the others wait in a collective forever and waste a cluster's time.
Every phase of the work therefore reports its start here. If no report comes within the limit, the
process exits. It first prints its rank, its last phase and the stacks of its threads.
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
from post_dist.runtime.last_error import report_error

log = logging.getLogger(__name__)

_CHECKS_PER_LIMIT = 10
"""Number of checks within the time limit. A hang is found at most a tenth of the limit late."""


class _Watch:
    """The state that the watching thread checks."""

    phase = "starting"
    moved = time.monotonic()
    paused = False
    thread: threading.Thread | None = None


def watch(rank: int, limit_seconds: float) -> None:
    """Start to watch this process, or resume after `pause_watchdog`.

    Args:
        rank: number of this rank, for the message.
        limit_seconds: longest time that the process may take without a new phase. The first call
            sets it.
    """
    phase("starting")
    _Watch.paused = False
    # A second command in the same process uses the same thread.
    if _Watch.thread is None:
        _Watch.thread = threading.Thread(
            target=_watch_progress, args=(rank, limit_seconds), daemon=True, name="watchdog"
        )
        _Watch.thread.start()


def pause_watchdog() -> None:
    """Stop watching, at the end of a command."""
    _Watch.paused = True


def phase(name: str) -> None:
    """Report that this process makes progress and begins a phase of its work."""
    _Watch.phase = name
    _Watch.moved = time.monotonic()


def current_phase() -> str:
    """Return the phase that this process has begun last."""
    return _Watch.phase


@contextmanager
def unwatched(name: str) -> Iterator[None]:
    """Pause the watch for a wait of unknown length, such as a download or another rank's work."""
    phase(name)
    # Waits may be nested; only the outermost one resumes the watch.
    paused_before = _Watch.paused
    _Watch.paused = True
    try:
        yield
    finally:
        _Watch.paused = paused_before
        phase(name)


def _watch_progress(rank: int, limit_seconds: float) -> None:
    while True:
        time.sleep(limit_seconds / _CHECKS_PER_LIMIT)
        if not _Watch.paused and time.monotonic() - _Watch.moved >= limit_seconds:
            _end(rank, limit_seconds)


def _end(rank: int, limit_seconds: float) -> None:
    """Report the hang and exit. The main thread hangs, so no exception can be raised in it."""
    fault = EnvironmentFault(
        f"rank {rank} has made no progress for {limit_seconds:g} s in: {_Watch.phase}",
        "look for a rank that has died or hangs; the same command resumes from the last checkpoint",
    )
    log.error("%s", fault)  # for the rank's own log file
    report_error(fault)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    sys.stderr.flush()
    os._exit(EnvironmentFault.exit_code)
