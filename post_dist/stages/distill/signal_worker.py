"""A worker that runs the teacher over the corpus and writes files of signals.

Any number of workers may fill one folder at the same time. A worker is a group of ranks that holds
one teacher. It claims a file by a lock on one byte of a common file. The operating system drops the
lock when the process ends, so a file of a dead worker is free at once. If locks do not work, two
workers may make the same file, and write the same bytes.
"""

import fcntl
import logging
import time
from typing import cast

import torch

from post_dist.data.corpus import Corpus
from post_dist.files import lock_file, writing
from post_dist.runtime.distributed import World
from post_dist.runtime.progress import progress
from post_dist.runtime.stop import stop_requested, stopped
from post_dist.runtime.watchdog import phase
from post_dist.stages.distill.signal_files import SEQUENCES_A_FILE, SignalFiles
from post_dist.stages.distill.signal_maker import SignalMaker

log = logging.getLogger(__name__)

_CLAIMS = "claims"
"""Name of the empty file whose byte N is locked by the worker that makes file N."""
_SECONDS_BETWEEN_LOOKS = 1.0
"""Time until a worker looks again whether another one has finished or died."""


class _Claims:
    """The files that this worker makes, and no other worker at the same time.

    Args:
        files: the files of signals.
        count: number of files that are needed.
    """

    def __init__(self, files: SignalFiles, count: int) -> None:
        self._files = files
        self._count = count
        # All files before this number exist.
        self._first = 0
        self._claimed: list[int] = []
        path = files.folder / _CLAIMS
        with writing(path):
            files.folder.mkdir(parents=True, exist_ok=True)
            # One open file for all claims: closing a second one would drop the locks of the first.
            self._locks = path.open("a")
            # `post-dist clean` leaves a folder alone while a worker shares this lock.
            self._held = (files.folder / "lock").open("a")
            lock_file(self._held, shared=True)

    def next(self, at_most: int) -> list[int] | None:
        """Release the files claimed before, and claim the next missing ones.

        Args:
            at_most: most files to claim.

        Returns:
            Their numbers; none if other workers are making all that are missing. None if no file
            is missing.
        """
        # A file is released after it is written, so another worker that gets the lock finds it.
        for file in self._claimed:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, file)
        self._claimed = []
        # Full subfolders are not listed again: with a million files that would take hours.
        first_missing = None
        for file in self._files.missing(self._first, self._count):
            if first_missing is None:
                first_missing = file
            if self._lock(file):
                # Another worker may have finished it since the folder was listed.
                if self._files.path(file).exists():
                    fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, file)
                    continue
                self._claimed.append(file)
            if len(self._claimed) == at_most:
                break
        if first_missing is None:
            return None
        self._first = first_missing
        return self._claimed

    def close(self) -> None:
        """Release all files, and the folder."""
        self._locks.close()
        self._held.close()

    def _lock(self, file: int) -> bool:
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, file)
        # POSIX allows both errors for a lock that another process holds.
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            log.warning("%s cannot be locked: %s", self._locks.name, error.strerror)
        return True


def fill(files: SignalFiles, count: int, maker: SignalMaker, corpus: Corpus, world: World) -> None:
    """Write files until the first `count` exist. All ranks of the worker call it.

    It waits for files that other workers are making, and makes those of a worker that died.

    Args:
        files: the files of signals.
        count: number of files that are needed.
        maker: computes the signals; all ranks run it equally often.
        corpus: the sequences.
        world: the ranks of this worker.

    Raises:
        InputError: a file cannot be written.
        EnvironmentFault: the disk is full.
        Interrupted: a rank was asked to stop; complete files are kept.
    """

    def look() -> tuple[_Claims, int]:
        return _Claims(files, count), sum(1 for _ in files.missing(0, count))

    # Only rank 0 looks and locks, so all ranks work on the same files.
    claims, missing = world.together(look) if world.is_main else world.together(lambda: (None, 0))

    def claim() -> list[int] | None:
        return cast(_Claims, claims).next(world.size)

    try:
        if missing:
            log.info(
                "teacher signals: %d sequences to run, %d files of %d are in %s",
                missing * SEQUENCES_A_FILE,
                count - missing,
                count,
                files.folder,
            )
        with progress("teacher signals", missing, show=world.is_main) as advance:
            while (numbers := world.on_main(claim)) is not None:
                _make_files(files, numbers, maker, corpus, world)
                for _ in numbers:
                    advance("")
                # The run stops only between files, so no finished signal is lost.
                if stop_requested(world):
                    raise stopped("the teacher signals written so far are kept")
                # A worker that waits is not stuck, so it tells the watchdog.
                if not numbers:
                    phase("teacher signals: waiting for other workers")
                    time.sleep(_SECONDS_BETWEEN_LOOKS)
    finally:
        if claims is not None:
            claims.close()


def _make_files(
    files: SignalFiles, numbers: list[int], maker: SignalMaker, corpus: Corpus, world: World
) -> None:
    """Make one file on each rank, from the same batches on any number of ranks."""
    if not numbers:
        return
    # A rank without a file runs the first one too: a sharded teacher needs all ranks.
    has_own = world.rank < len(numbers)
    own = numbers[world.rank] if has_own else numbers[0]
    places = files.places(own)
    longest = max(len(files.places(number)) for number in numbers)
    size = maker.section.micro_batch_size_per_gpu
    parts = []
    for start in range(0, longest, size):
        counted = places[start : start + size]
        phase(f"teacher signals: file {own}")
        # The last file may be shorter, and its rank then repeats a batch.
        sequences = corpus.numbers_at(counted or places[:size])
        input_ids_BT = corpus.sequences(sequences).to(world.device)
        made = maker.make(sequences, input_ids_BT, corpus.positions(input_ids_BT))
        if counted:
            parts.append(made)
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    # If one rank cannot write, all stop. Else the others would wait in a collective.
    world.together(lambda: files.write(own, tensors) if has_own else None)
