"""A request to stop: from Slurm before a time limit (SIGUSR2), from whoever ends a job (SIGTERM), or Ctrl-C (SIGINT).

The signal only sets a flag; an exception, as Python makes of Ctrl-C, is lost where a library swallows what its callbacks raise.
All ranks look at the flag together between two steps, save, and leave with exit code 6, so that the same command goes on from there.
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

if TYPE_CHECKING:  # it loads torch, and signals may come before that
    from post_dist.runtime.distributed import World

_requested: list[str] = []
_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


def listen() -> None:
    """Take the three signals as requests to stop; a second Ctrl-C stops at once."""
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
    """It is decided how this process ends, and from now on no request changes that.

    Slurm, told that one task has left, ends the others, and one that dies of it would hide the exit code of all.
    """
    for name in ("SIGTERM", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def end_process(exit_code: int) -> NoReturn:
    """End with this code now, without taking the interpreter down around the threads of libraries.

    One of them that wants the interpreter just then aborts the process ("terminate called without an active exception", once in some
    hundred jobs of two ranks), and Slurm takes a saved or finished job for a failed one.
    """
    leave_quietly()
    atexit.unregister(end_process)  # it may be one of the functions that it runs
    try:
        atexit._run_exitfuncs()  # temporary folders, logs; as multiprocessing does before it ends a process of its own this way
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(exit_code)


def stop_requested(world: "World") -> bool:
    """Whether any rank was asked to stop; all ranks call it, and hear the same."""
    return world.any(bool(_requested))


def stopped(what: str) -> Interrupted:
    """The error to leave with once everything is saved."""
    by = f" by {_requested[0]}" if _requested else ""
    return Interrupted(f"stopped{by}: {what}", "the same command goes on from there")


def _request(number: int, frame: FrameType | None) -> None:
    _requested.append(signal.Signals(number).name)
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\npost-dist: saving after this step; Ctrl-C again stops at once", file=sys.stderr)
