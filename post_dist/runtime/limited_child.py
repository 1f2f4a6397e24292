"""Run a function in a child process with limits, for libraries that may hang, crash or quote."""

import json
import multiprocessing
import os
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_PAGE_BYTES = resource.getpagesize()
_WAIT_FACTOR = 10
"""Longest wait for a child over its seconds of the processor, which it may share with others."""


class ChildFailed(Exception):
    """The child exceeded a limit, crashed, or raised an error."""


def in_limited_child(work: Callable[[], Any], seconds: int, memory_bytes: int) -> Any:
    """Return the result of a function that runs in a forked child.

    The child must not use the accelerator. What it prints is dropped, because the crash report of
    a library may quote the text that it was given.

    Args:
        work: the function. Its result must be a JSON value.
        seconds: most seconds of the processor.
        memory_bytes: most memory that the child may add to what this process has.

    Raises:
        ChildFailed: there is no result.
    """
    # A forked child has the tokenizer and the texts already. Only the result must be sent.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(work, theirs, seconds, memory_bytes), daemon=True)
    child.start()
    # The end of the child is noticed only if nobody else can write to the pipe.
    theirs.close()
    try:
        # A child that waits for a lock of a thread that it lacks uses no processor.
        if not ours.poll(_WAIT_FACTOR * seconds):
            raise ChildFailed
        return json.loads(ours.recv_bytes())
    except (EOFError, OSError):
        raise ChildFailed from None
    finally:
        ours.close()
        child.kill()
        child.join()


def _run(work: Callable[[], Any], result: Connection, seconds: int, memory_bytes: int) -> None:
    """Do the work of the child."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE_BYTES
    _limit(resource.RLIMIT_AS, used + memory_bytes)
    _limit(resource.RLIMIT_CPU, seconds)
    _limit(resource.RLIMIT_CORE, 0)
    result.send_bytes(json.dumps(work()).encode())


def _limit(kind: int, most: int) -> None:
    """Set a limit of this process, unless a lower one holds."""
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(kind, (most, most))
