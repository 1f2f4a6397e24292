"""What the drivers that kill runs share: dying at a chosen call, and a fork that runs the command line."""

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int, *, before: bool) -> None:
    """Die before or after the `number`-th call of a function."""
    real, calls = getattr(owner, name), Counter()

    def counted(*given: Any, **named: Any) -> Any:
        calls[name] += 1
        if before and calls[name] == number:
            die()
        result = real(*given, **named)
        if not before and calls[name] == number:
            die()
        return result

    setattr(owner, name, counted)


def fork_command(
    arguments: list[str], environment: Mapping[str, str], said: Path, prepare: Callable[[], None]
) -> int:
    """Run the command line in a forked child, in which the libraries are loaded already; its process number."""
    child = os.fork()
    if child:
        return child
    log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    prepare()
    from post_dist import cli

    sys.argv = ["post-dist", *arguments]
    os._exit(cli.run_command())
