"""The command line of one rank, to which something is done before: `prepared_rank.py PREPARATION ARGUMENT...`"""

import errno
import hashlib
import os
import re
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

from post_dist.cli import main
from post_dist.runtime.schedule import Schedule
from post_dist.stages.distill import stage as distill


def stopped_at_its_third_step() -> None:
    real = Schedule.factor

    def factor(schedule: Schedule, step: int) -> float:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(schedule, step)

    Schedule.factor = factor


def on_a_node_that_remembers_what_it_missed() -> None:
    """As an NFS client does: a name that was not there is not there for half a minute, whoever makes it; only making it asks the server."""
    real_lstat, missed = os.lstat, set()

    def is_missed(path: Path) -> bool:
        return not missed.isdisjoint([path, *path.parents])

    def look(real: Callable, path: object, **named: object) -> os.stat_result:
        place = Path(os.path.abspath(path)) if isinstance(path, str | Path) else Path()
        if is_missed(place):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        try:
            return real(path, **named)
        except FileNotFoundError:
            for part in [*reversed(place.parents), place]:
                try:
                    real_lstat(part)
                except FileNotFoundError:
                    missed.add(part)
                    break
            raise

    def hear(event: str, given: tuple) -> None:
        if event not in ("open", "os.mkdir") or not isinstance(given[0], str | Path):
            return
        place = Path(os.path.abspath(given[0]))
        if event == "os.mkdir" or given[2] & os.O_CREAT:
            missed.discard(place)
        if is_missed(place):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place))

    os.stat, os.lstat = partial(look, os.stat), partial(look, os.lstat)
    sys.addaudithook(hear)


def allowed_to_hash_prompts_alone() -> None:
    real = hashlib.file_digest

    def file_digest(file: BinaryIO, kind: str) -> object:
        assert re.search("/(tune|transfer)-", file.name), file.name
        return real(file, kind)

    hashlib.file_digest = file_digest


def given_no_whole_model() -> None:
    real = distill.full_weights

    def full_weights(*given: object) -> dict:
        weights = real(*given)
        assert weights == {}, f"{len(weights)} tensors"
        return weights

    distill.full_weights = full_weights


PREPARATIONS: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "stopped at its third step": stopped_at_its_third_step,
    "on a node that remembers what it missed": on_a_node_that_remembers_what_it_missed,
    "allowed to hash prompts alone": allowed_to_hash_prompts_alone,
    "given no whole model": given_no_whole_model,
}

if __name__ == "__main__":
    PREPARATIONS[sys.argv.pop(1)]()
    main()
