"""What a person sees while a stage runs: a bar with the time left on a terminal, plain log lines elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from post_dist.runtime.watchdog import phase

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 15.0


@contextmanager
def progress(label: str, total: int, done: int = 0, *, show: bool = True) -> Iterator[Callable[[str], None]]:
    """Yield a function that marks one more of `total` as done, with a short text beside it.

    Args:
        label: what is being done.
        total: how many there are.
        done: how many were done before.
        show: False on all ranks but the first.
    """
    phase(f"{label}, {done} of {total} done")
    if not show:
        yield _silent(label, total, done)
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[text]}"), console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total, completed=done, text="")
            moved = _silent(label, total, done)

            def advance(text: str) -> None:
                moved(text)
                bar.update(task, advance=1, text=text)

            yield advance
    else:
        yield _lines(label, total, done)


def _silent(label: str, total: int, done: int) -> Callable[[str], None]:
    """Tells the watchdog alone."""

    def advance(text: str) -> None:
        nonlocal done
        done += 1
        phase(f"{label}, {done} of {total} done")

    return advance


def _lines(label: str, total: int, done: int) -> Callable[[str], None]:
    start = last = time.monotonic()
    first = done

    def advance(text: str) -> None:
        nonlocal done, last
        done += 1
        phase(f"{label}, {done} of {total} done")
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES or done == total:
            last = now
            left = (now - start) / (done - first) * (total - done)
            log.info("%s %d/%d %s(%.0f s left)", label, done, total, f"{text} " if text else "", left)

    return advance
