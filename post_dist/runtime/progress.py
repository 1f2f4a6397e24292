"""Show the progress of a stage: a bar on a terminal, and log lines elsewhere."""

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

Advance = Callable[[str], None]
"""Function that counts one more item as done and shows a short text."""


@contextmanager
def progress(label: str, total: int, done: int = 0, *, show: bool = True) -> Iterator[Advance]:
    """Yield a function that counts one more item as done and shows a short text next to the count.

    Each call also tells the watchdog that the process makes progress.

    Args:
        label: name of the work.
        total: number of items.
        done: number of items that are already done.
        show: whether to show progress; False on all ranks but rank 0.
    """
    phase(f"{label}, {done} of {total} done")
    with _display(label, total, done, show=show) as display:

        def advance(text: str) -> None:
            nonlocal done
            done += 1
            phase(f"{label}, {done} of {total} done")
            display(text)

        yield advance


@contextmanager
def _display(label: str, total: int, done: int, *, show: bool) -> Iterator[Advance]:
    """Yield a function that updates what the user sees."""
    # A bar works only on a terminal, so a log file gets lines.
    if not show:
        yield lambda text: None
    elif sys.stderr.isatty():
        with _bar() as bar:
            task = bar.add_task(label, total=total, completed=done, text="")
            yield lambda text: bar.update(task, advance=1, text=text)
    else:
        yield _lines(label, total, done)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=Console(stderr=True),
    )


def _lines(label: str, total: int, done: int) -> Advance:
    """Return a function that logs a line every 15 seconds, with the time left."""
    first = done
    start = time.monotonic()
    last_line = start

    def advance(text: str) -> None:
        nonlocal done, last_line
        done += 1
        now = time.monotonic()
        if now - last_line < _SECONDS_BETWEEN_LINES and done != total:
            return
        last_line = now
        # Only items of this process count for its speed.
        seconds_each = (now - start) / (done - first)
        seconds_left = seconds_each * (total - done)
        shown_text = f"{text} " if text else ""
        log.info("%s %d/%d %s(%.0f s left)", label, done, total, shown_text, seconds_left)

    return advance
