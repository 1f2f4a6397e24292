"""What `started.run_ranks` can do in a rank before its command line runs."""

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

import huggingface_hub
from faults import at_call

from post_dist.runtime.schedule import Schedule
from post_dist.stages.distill import stage as distill_stage
from post_dist.stages.distill.trainer import DistillationJob


def stopped_at_its_third_step() -> None:
    real = Schedule.factor

    def factor(schedule: Schedule, step: int) -> float:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(schedule, step)

    Schedule.factor = factor


class NfsClient:
    """Fakes the cache of an NFS client, which remembers failed lookups for half a minute.

    A name that was not there stays absent for this process, whoever creates it meanwhile. Only
    creating it from this process asks the server again.
    """

    def __init__(self) -> None:
        self._missed: set[Path] = set()
        self._real_lstat = os.lstat

    def start(self) -> None:
        os.stat = partial(self._look, os.stat)
        os.lstat = partial(self._look, os.lstat)
        sys.addaudithook(self._on_event)

    def _raise_if_missed(self, place: Path, name: object) -> None:
        if not self._missed.isdisjoint([place, *place.parents]):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(name))

    def _look(self, real: Callable, path: object, **named: object) -> os.stat_result:
        place = Path(os.path.abspath(path)) if isinstance(path, str | Path) else Path()
        self._raise_if_missed(place, path)
        try:
            return real(path, **named)
        except FileNotFoundError:
            self._remember_first_absent(place)
            raise

    def _remember_first_absent(self, place: Path) -> None:
        for part in [*reversed(place.parents), place]:
            try:
                self._real_lstat(part)
            except FileNotFoundError:
                self._missed.add(part)
                return

    def _on_event(self, event: str, given: tuple) -> None:
        if event not in ("open", "os.mkdir") or not isinstance(given[0], str | Path):
            return
        place = Path(os.path.abspath(given[0]))
        if event == "os.mkdir" or given[2] & os.O_CREAT:
            self._missed.discard(place)
        self._raise_if_missed(place, place)


def allowed_to_hash_prompts_alone() -> None:
    real = hashlib.file_digest

    def file_digest(file: BinaryIO, kind: str) -> object:
        assert re.search("/(tune|transfer)-", file.name), file.name
        return real(file, kind)

    hashlib.file_digest = file_digest


def told_when_the_hub_is_asked() -> None:
    """Take a folder for a hub model's cache, and say on standard error when the hub is asked."""
    folder = os.environ["HUB_CACHE_OF_THIS_TEST"]

    def snapshot_download(name: str, *, local_files_only: bool, **_: object) -> str:
        if not local_files_only:
            print(f"asked the hub for {name}", file=sys.stderr)
        return folder

    huggingface_hub.snapshot_download = snapshot_download


def given_no_whole_model() -> None:
    real = distill_stage.full_weights

    def full_weights(*given: object) -> dict:
        weights = real(*given)
        assert weights == {}, f"{len(weights)} tensors"
        return weights

    distill_stage.full_weights = full_weights


def killed_in_its_17th_step() -> None:
    at_call(DistillationJob, "take_step", 17, before=True)


PREPARATIONS: dict[str, Callable[[], object]] = {
    "stopped at its third step": stopped_at_its_third_step,
    "on a node that remembers what it missed": lambda: NfsClient().start(),
    "allowed to hash prompts alone": allowed_to_hash_prompts_alone,
    "killed in its 17th step": killed_in_its_17th_step,
    "given no whole model": given_no_whole_model,
    "told when the hub is asked": told_when_the_hub_is_asked,
}
