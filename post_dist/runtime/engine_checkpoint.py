"""Checkpoints of a training engine: the state of the student in one file per rank.

Only the copy of the state into the host's memory stops the training. Each rank then writes and
hashes its own file in a thread, behind the next steps. At a restart each rank reads its own file.
"""

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import deepspeed
import torch
from safetensors.torch import save_file

from post_dist.errors import ArtifactRefused, Interrupted
from post_dist.files import file_digest, flush, make_folder, put_in_place, writing
from post_dist.runtime.checkpoint import drop_old, seal, sealed_digests, start_step
from post_dist.runtime.distributed import World
from post_dist.runtime.engine_state import engine_state, holds_state, restore_engine
from post_dist.runtime.local_copies import LocalCopies
from post_dist.runtime.stop import saving
from post_dist.runtime.watchdog import phase


@dataclass(frozen=True)
class _Write:
    """A checkpoint that is being written.

    Attributes:
        place: its folder, once it is complete.
        partial: the folder that holds the ranks' files until then.
        digests: the digest of this rank's file by its name; empty if the rank has no state.
    """

    place: Path
    partial: Path
    digests: Future[dict[str, str]]


class EngineCheckpoints:
    """Writes the checkpoints of a training engine while it trains. All ranks call each method.

    A checkpoint gets its name when every rank has written its file. Until then the one before it is
    the newest. At most one is being written, so the copies in memory are bounded.

    Args:
        folder: the folder of all checkpoints.
        engine: the training engine.
        world: the ranks.
        copies: second copies of this rank's files.
    """

    def __init__(
        self, folder: Path, engine: deepspeed.DeepSpeedEngine, world: World, copies: LocalCopies
    ) -> None:
        self._folder = folder
        self._engine = engine
        self._world = world
        self._copies = copies
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._write: _Write | None = None

    def begin(self, step: int) -> None:
        """Copy the trained weights and the optimizer's state, and begin to write the copy.

        Args:
            step: the next step of the run.

        Raises:
            InputError: a rank cannot write; earlier checkpoints are unchanged.
            EnvironmentFault: the disk is full; earlier checkpoints are unchanged.
        """
        self.finish()
        phase(f"copying the state of step {step}")
        place = self._folder / f"step-{step}"
        files = self._folder / f".step-{step}.partial"
        self._world.on_main(partial(_make_room, files, place))
        file = files / _file_name(self._world.rank)
        state = engine_state(self._engine)
        digests = self._thread.submit(_write_file, file, place, state, self._copies)
        self._write = _Write(place, files, digests)

    def settle(self) -> None:
        """Complete the checkpoint that is being written, if no rank has to wait for it.

        Raises:
            InputError: a rank could not write; earlier checkpoints are unchanged.
            EnvironmentFault: the disk is full; earlier checkpoints are unchanged.
        """
        # All ranks began the same checkpoint, so all of them take part in this collective.
        if self._write and not self._world.any(not self._write.digests.done()):
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is complete. Without one, do nothing.

        Raises:
            InputError: a rank could not write; earlier checkpoints are unchanged.
            EnvironmentFault: the disk is full; earlier checkpoints are unchanged.
        """
        if self._write is None:
            return
        write, self._write = self._write, None
        phase(f"writing the checkpoint {write.place.name}")

        def complete() -> None:
            with writing(write.place):
                seal(write.partial, digests)
                put_in_place(write.partial, write.place)
            drop_old(self._folder)

        try:
            with saving():
                # This returns when every rank has written, so rank 0 seals complete files.
                digests = self._world.merged(self._world.together(write.digests.result))
                self._world.on_main(complete)
        finally:
            # After a failure, the temporary folder is of no use.
            if self._world.is_main:
                shutil.rmtree(write.partial, ignore_errors=True)


@contextmanager
def engine_checkpoints(
    folder: Path, engine: deepspeed.DeepSpeedEngine, world: World, copies: LocalCopies
) -> Iterator[EngineCheckpoints]:
    """Give the body checkpoints to write, and complete the last one when it ends or is stopped.

    Args:
        folder: the folder of all checkpoints.
        engine: the training engine.
        world: the ranks, which all call this function.
        copies: second copies of this rank's files.
    """
    checkpoints = EngineCheckpoints(folder, engine, world, copies)
    try:
        yield checkpoints
    except Interrupted:
        # All ranks stop after the same step. After any other error a rank may be gone.
        checkpoints.finish()
        raise
    checkpoints.finish()


@dataclass(frozen=True)
class _SavedFile:
    """A file of a checkpoint.

    Attributes:
        original: the file in the checkpoint.
        digest: its digest, from the checkpoint's seal.
        copy: an undamaged copy on this rank's node, which was found in place of the original; the
            original was not read then.
    """

    original: Path
    digest: str
    copy: Path | None = None


@dataclass(frozen=True)
class EngineStart:
    """What a training engine starts from.

    Attributes:
        step: the step to start from; 0 without a checkpoint.
        files: the files of the checkpoint, in the order of the ranks that wrote them.
        world: the ranks.
    """

    step: int
    files: Sequence[_SavedFile]
    world: World

    def restore(self, engine: deepspeed.DeepSpeedEngine) -> None:
        """Set an engine to the checkpoint, if there is one. All ranks call it.

        The number of ranks and the ZeRO stage may differ from those of the run that saved it.

        Raises:
            ArtifactRefused: a file is damaged whose copy is on another rank's node.
        """
        if not self.step:
            return
        own = self._own_file()
        if not self.world.any(own is None or not holds_state(own, engine)):
            restore_engine(engine, [cast(Path, own)])
            return
        # With another layout, a rank reads files of others. Their copies may be out of its reach.
        self.world.together(self._check_originals)
        restore_engine(engine, [file.original for file in self.files])

    def _own_file(self) -> Path | None:
        """Return the file that a rank of this number has written, or the copy of it."""
        rank = self.world.rank
        if rank >= len(self.files) or self.files[rank].original.name != _file_name(rank):
            return None
        return self.files[rank].copy or self.files[rank].original

    def _check_originals(self) -> None:
        """Hash the originals of this rank's share that were not read yet."""
        for file in self.files:
            if file.copy is not None and not _is_whole(file.original, file.digest):
                raise ArtifactRefused(
                    f"{file.original} is damaged, and this number of ranks or ZeRO stage cannot "
                    "read its copy",
                    f"start once with the earlier layout, or delete {file.original.parent} to go "
                    "back to the checkpoint before it",
                )


def engine_start(folder: Path, resume: str, world: World, copies: LocalCopies) -> EngineStart:
    """Return the newest undamaged checkpoint. All ranks call it, and each reads its own file.

    Args:
        folder: the folder of all checkpoints.
        resume: `auto`, or `never` to delete earlier checkpoints.
        world: the ranks.
        copies: second copies of this rank's files, which are read instead of them.
    """
    files: list[_SavedFile] = []

    def whole(place: Path) -> bool:
        found = _undamaged_files(place, world, copies)
        files[:] = found or []
        return not world.any(found is None)

    step = start_step(folder, resume, world, whole)
    return EngineStart(step, files, world)


def _undamaged_files(place: Path, world: World, copies: LocalCopies) -> list[_SavedFile] | None:
    """Return the files of a checkpoint, or None if this rank's share of them is damaged."""
    sealed = sealed_digests(place)
    if sealed is None:
        return None
    # In the order of the ranks that wrote them, so that each rank reads its own one.
    names = sorted(sealed, key=lambda name: (len(name), name))
    files = [_SavedFile(place / name, sealed[name]) for name in names]
    # Other files may lie beside them, such as one that NFS keeps for a process that reads it.
    if not all(file.original.is_file() for file in files):
        return None
    for number in range(world.rank, len(files), world.size):
        file = files[number]
        copy = copies.find(file.digest)
        if copy is not None:
            files[number] = replace(file, copy=copy)
        elif not _is_whole(file.original, file.digest):
            return None
    return files


def _is_whole(file: Path, digest: str) -> bool:
    return file_digest(file, partial(phase, f"reading {file.parent.name}")) == digest


def _file_name(rank: int) -> str:
    return f"rank{rank}.safetensors"


def _make_room(files: Path, place: Path) -> None:
    with writing(place):
        shutil.rmtree(files, ignore_errors=True)
        make_folder(files)


def _write_file(
    file: Path, place: Path, tensors: dict[str, torch.Tensor], copies: LocalCopies
) -> dict[str, str]:
    """Write a rank's file to the disk, and return its digest by its name.

    It runs in a thread. Rank 0 alone would need a minute to hash the files of a large student.
    """
    if not tensors:
        return {}
    with writing(place):
        save_file(tensors, file)
        flush(file)
        digest = file_digest(file)
    copies.keep(tensors, digest)
    return {file.name: digest}
