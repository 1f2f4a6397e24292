"""Helpers to kill runs: die at a chosen call, and run the command line in a forked process."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# DeepSpeed's engine imports it, which takes 3 s. A forked command has it loaded already.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401


def die() -> None:
    """End as a process does that the system kills."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int, *, before: bool) -> None:
    """Die before or after the `number`-th call of a function."""
    real = getattr(owner, name)
    calls = 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if before and calls == number:
            die()
        result = real(*given, **named)
        if not before and calls == number:
            die()
        return result

    setattr(owner, name, counted)


def fork_command(
    arguments: list[str], environment: Mapping[str, str], said: Path, prepare: Callable[[], None]
) -> int:
    """Run the command line in a forked child, where the libraries are loaded already.

    Returns its process number.
    """
    child = os.fork()
    if child:
        return child
    log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    gc.freeze()
    prepare()
    from post_dist import cli

    sys.argv = ["post-dist", *arguments]
    os._exit(cli.run_command())
