"""Requests to stop, and the end of a process.

Slurm sends SIGUSR2 before a time limit, whoever ends a job sends SIGTERM, and Ctrl-C is SIGINT. The
signal handler only sets a flag. An exception in its place, as Python raises for Ctrl-C, is lost
where a library swallows what its callbacks raise. All ranks look at the flag together between two
steps, save, and leave with exit code 6, so that the same command resumes.
"""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from post_dist.errors import Interrupted

if TYPE_CHECKING:  # the import loads torch, and a signal may come before that is done
    from post_dist.runtime.distributed import World

_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)

_requested: list[str] = []
"""Names of the signals so far."""


def listen() -> None:
    """Treat the three signals as requests to stop. A second Ctrl-C stops at once."""
    _requested.clear()
    for number in _SIGNALS:
        signal.signal(number, _request)


@contextmanager
def listening() -> Iterator[None]:
    """Take the three signals as requests to stop while the body runs, and no longer.

    A command listens from its start to its end; then this changes nothing. Python allows signal
    handlers in the main thread only, so a call from another thread cannot be stopped this way.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is _request:
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    listen()
    try:
        yield
    finally:
        _requested.clear()
        for number, handler in before.items():
            if handler is not None:  # None: it was set by C code, and cannot be set again
                signal.signal(number, handler)


def leave_quietly() -> None:
    """Ignore further requests, once the exit code of this process is decided.

    When one task has left, Slurm ends the others. If one of them died of that signal, its exit code
    would hide that of all others.
    """
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def end_process(exit_code: int) -> NoReturn:
    """End this process now, without tearing down the interpreter around the threads of libraries.

    A thread that needs the interpreter during the teardown aborts the process ("terminate called
    without an active exception", about once in a hundred jobs of two ranks). Slurm would then take
    a finished job for a failed one.
    """
    leave_quietly()
    # This function may be one of those that atexit runs.
    atexit.unregister(end_process)
    try:
        # Removes temporary folders and closes logs. multiprocessing does the same in processes that
        # it ends this way.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(exit_code)


def stop_requested(world: "World") -> bool:
    """Whether any rank was asked to stop; the same answer on all. All ranks call it together."""
    return world.any(bool(_requested))


def stopped(what: str) -> Interrupted:
    """Return the error to leave with once everything is saved.

    Args:
        what: what was saved, and at which step.
    """
    by = f" by {_requested[0]}" if _requested else ""
    return Interrupted(f"stopped{by}: {what}", "the same command resumes from there")


def _request(number: int, frame: FrameType | None) -> None:
    _requested.append(signal.Signals(number).name)
    if number == signal.SIGINT:
        # A second Ctrl-C raises KeyboardInterrupt, as usual.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\npost-dist: saving after this step; Ctrl-C again stops at once", file=sys.stderr)
