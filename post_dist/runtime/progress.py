"""What a person sees while a stage runs: a bar with the time left on a terminal, plain log lines elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from post_dist.runtime.watchdog import phase

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 15.0


@contextmanager
def progress(
    label: str, total: int, done: int = 0, *, show: bool = True
) -> Iterator[Callable[[str], None]]:
    """Yield a function that marks one more of `total` as done, with a short text beside it.

    Args:
        label: what is being done.
        total: how many there are.
        done: how many were done before.
        show: False on all ranks but the first.
    """
    phase(f"{label}, {done} of {total} done")
    with _shown(label, total, done, show=show) as mark:

        def advance(text: str) -> None:
            nonlocal done
            done += 1
            phase(f"{label}, {done} of {total} done")
            mark(text)

        yield advance


@contextmanager
def _shown(label: str, total: int, done: int, *, show: bool) -> Iterator[Callable[[str], None]]:
    """What a person sees of it."""
    if not show:
        yield lambda text: None
    elif sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns, TextColumn("{task.fields[text]}"), console=Console(stderr=True)
        ) as bar:
            task = bar.add_task(label, total=total, completed=done, text="")
            yield lambda text: bar.update(task, advance=1, text=text)
    else:
        yield _lines(label, total, done)


def _lines(label: str, total: int, done: int) -> Callable[[str], None]:
    start = last = time.monotonic()
    first = done

    def advance(text: str) -> None:
        nonlocal done, last
        done += 1
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES or done == total:
            last = now
            left = (now - start) / (done - first) * (total - done)
            log.info(
                "%s %d/%d %s(%.0f s left)", label, done, total, f"{text} " if text else "", left
            )

    return advance
