"""Handle requests to stop, and end the process.

Slurm sends SIGUSR2 before a time limit and SIGTERM when it cancels a job. Ctrl-C sends SIGINT. The
signal handler only sets a flag. It raises no exception, because some libraries swallow those that
are raised in their callbacks. Between two steps, all ranks check the flag together. They then save
their state and leave with exit code 6. The same command resumes the run.

Python calls a signal handler only between two instructions of the main thread, which may be inside
a collective or a read for minutes. A thread of its own therefore ends a process that has nothing to
save (see `leave_in_seconds`).
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from post_dist.errors import Interrupted
from post_dist.runtime.last_error import report_error
from post_dist.runtime.watchdog import current_phase

if TYPE_CHECKING:  # this import loads torch, but the handlers must be ready before that
    from post_dist.runtime.distributed import World

_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)

_SECONDS_TO_LEAVE = 4.0
"""Seconds until a request to stop ends work that nobody saves. Slurm kills after 30."""
_POLL_SECONDS = 0.2

_requested: list[str] = []
"""Names of the signals that this process has received."""


class _Work:
    """Whether the work of this process leaves by itself after a request to stop."""

    saves = 0


def listen() -> None:
    """Treat the three signals as requests to stop. A second Ctrl-C stops at once."""
    _requested.clear()
    for number in _SIGNALS:
        signal.signal(number, _request)


@contextmanager
def listening() -> Iterator[None]:
    """Treat the three signals as requests to stop while the body runs.

    Within a command this changes nothing, because a command listens from start to end. Python
    allows signal handlers only in the main thread, so a call from another thread does not listen.
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
            if handler is not None:  # a handler from C code is None and cannot be restored
                signal.signal(number, handler)


def leave_in_seconds() -> None:
    """End this process a few seconds after SIGTERM or SIGUSR2, unless its work saves its state.

    Loading, hashing or a collective may take minutes, and saves nothing. Whatever was finished is
    on the disk already, so the same command resumes. Only the process of a command or a job calls
    this function, because a notebook must not end with its work.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # The interpreter writes the number of each signal there, even while the main thread waits.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # A forked process has the same pipe. Its signals are not requests to this one.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_end_in_time, args=(reader,), daemon=True, name="stop").start()


def _end_in_time(signals: int) -> None:
    """Wait for a request to stop. Then end the process, as soon as its work saves nothing."""
    name = ""
    while name not in ("SIGTERM", "SIGUSR2"):
        name = signal.Signals(os.read(signals, 1)[0]).name
    # After its work has saved, the process still tells the other ranks why it leaves.
    deadline = time.monotonic() + _SECONDS_TO_LEAVE
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        if _Work.saves:
            deadline = time.monotonic() + _SECONDS_TO_LEAVE
    stop = Interrupted(
        f"stopped by {name} in: {current_phase()}",
        "the same command resumes from what is saved",
    )
    report_error(stop)
    os._exit(Interrupted.exit_code)


@contextmanager
def saving() -> Iterator[None]:
    """Mark work that saves its state and leaves by itself after a request to stop."""
    _Work.saves += 1
    try:
        yield
    finally:
        _Work.saves -= 1


def was_requested() -> bool:
    """Return whether this process was asked to stop."""
    return bool(_requested)


def leave_quietly() -> None:
    """Ignore further signals, because the exit code of this process is decided.

    When one task has left, Slurm sends a signal to the others. If a task died of that signal, its
    exit code would hide the exit codes of all others.
    """
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def end_process(exit_code: int) -> NoReturn:
    """End this process now, without the normal shutdown of the interpreter.

    During that shutdown, a library's thread that needs the interpreter aborts the process. The
    message is "terminate called without an active exception". It happened in about one of a hundred
    jobs with two ranks. Slurm then reports a finished job as failed.
    """
    leave_quietly()
    # atexit itself may have called this function. It must not call it again.
    atexit.unregister(end_process)
    try:
        # The exit functions remove temporary folders and close logs. multiprocessing also calls
        # them before `os._exit`.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(exit_code)


def stop_requested(world: "World") -> bool:
    """Return whether any rank was asked to stop. All ranks call it and get the same answer."""
    return world.any(bool(_requested))


def leave_if_requested(what: str) -> None:
    """Leave work that one rank does alone, if this process was asked to stop.

    Args:
        what: description of what was saved.

    Raises:
        Interrupted: it was.
    """
    if _requested:
        raise stopped(what)


def stopped(what: str) -> Interrupted:
    """Return the error that ends a stopped run, after its state is saved.

    Args:
        what: description of what was saved, and at which step.
    """
    by = f" by {_requested[0]}" if _requested else ""
    return Interrupted(f"stopped{by}: {what}", "the same command resumes from there")


def _request(number: int, frame: FrameType | None) -> None:
    _requested.append(signal.Signals(number).name)
    if number == signal.SIGINT:
        # A second Ctrl-C raises KeyboardInterrupt, as usual.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\npost-dist: saving after this step; Ctrl-C again stops at once", file=sys.stderr)
