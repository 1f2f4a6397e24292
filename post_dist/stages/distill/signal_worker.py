"""A worker that runs the teacher over the corpus and writes files of signals.

Any number of workers may fill one folder at the same time. A worker is a group of ranks that holds
one teacher. It claims a file by a lock on one byte of a common file. The operating system drops the
lock when the process ends, so a file of a dead worker is free at once. If locks do not work, two
workers may make the same file, and write the same bytes.

If `distill.cache_gib` limits the number of files, a worker makes none that does not fit beside the
first one that the student still reads. It then waits for the student.
"""

import fcntl
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import cast

import torch

from post_dist.data.corpus import PackedCorpus
from post_dist.errors import EnvironmentFault
from post_dist.files import lock_file, make_folder, writing
from post_dist.runtime.distributed import World
from post_dist.runtime.progress import Advance
from post_dist.runtime.stop import stop_requested, stopped
from post_dist.runtime.watchdog import phase
from post_dist.stages.distill.signal_files import SEQUENCES_A_FILE, SignalFiles
from post_dist.stages.distill.signal_maker import SignalMaker

log = logging.getLogger(__name__)

_CLAIMS = "claims"
"""Name of the empty file whose byte N is locked by the worker that makes the file in slot N."""
_POLL_SECONDS = 1.0
"""Time until a worker checks again whether another one has finished or died."""


class _Claims:
    """The files that this worker makes, and no other worker at the same time.

    Args:
        files: the files of signals.
        count: number of files that are needed.
    """

    def __init__(self, files: SignalFiles, count: int) -> None:
        self._files = files
        self._count = count
        # All files before this number exist, or were read.
        self._first = files.first_read()
        self._claimed: list[int] = []
        path = files.folder / _CLAIMS
        make_folder(files.folder)
        with writing(path):
            # One open file for all claims: closing a second one would drop the locks of the first.
            self._locks = path.open("a")
            # `post-dist clean` leaves a folder alone while a worker shares this lock.
            self._held = (files.folder / "lock").open("a")
            lock_file(self._held, shared=True)

    def next(self, wanted: int, at_most: int) -> tuple[int, list[int], bool]:
        """Release the files claimed before, and claim missing ones unless the first `wanted` exist.

        Args:
            wanted: number of files that the caller needs now.
            at_most: most files to claim. They may be later ones than those that it needs.

        Returns:
            The number of the first file that is missing. The numbers of the claimed files, which
            are none if other workers are making all that are missing. Whether the limit of the
            cache keeps all workers from making more.

        Raises:
            InputError: a file that was read cannot be removed.
            EnvironmentFault: there is a limit, and the file system has no locks.
        """
        # A file is released after it is written, so another worker that gets the lock finds it.
        for file in self._claimed:
            self._unlock(file)
        self._claimed = []
        with self._exclusive():
            # Without a limit, full subfolders are not listed again: with a million files that would
            # take hours.
            if self._files.limited:
                self._first = self._files.first_read()
            end = min(self._first + self._files.slots, self._count)
            missing = self._files.missing(self._first, end)
            self._first = next(missing, end)
            if self._first < min(wanted, end):
                self._claimed = self._lock_files(chain([self._first], missing), at_most)
        return self._first, self._claimed, self._first == end < wanted

    def move(self, first: int) -> None:
        """Tell all workers the number of the first file that the student still reads.

        A student that resumes from a checkpoint may move back.

        Raises:
            InputError: the folder cannot be written to.
            EnvironmentFault: the disk is full, or the file system has no locks.
        """
        with self._exclusive():
            self._files.write_first_read(first)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep other processes from claiming files and from moving, if there is a limit.

        Otherwise a worker could remove a file just after the student has moved back and found it.
        """
        if not self._files.limited:
            yield
            return
        # The byte after those of the slots.
        byte = self._files.slots
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, byte)
        except OSError as error:
            raise EnvironmentFault(
                f"{self._locks.name} cannot be locked: {error.strerror}",
                "leave distill.cache_gib out, or give an --output on a file system with locks",
            ) from None
        try:
            yield
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, byte)

    def _lock_files(self, missing: Iterable[int], at_most: int) -> list[int]:
        """Lock the first of the missing files that no other worker makes."""
        locked: list[int] = []
        for file in missing:
            if not self._lock(file):
                continue
            # Another worker may have finished it since the folder was listed.
            if self._files.path(file).exists():
                self._unlock(file)
                continue
            if self._files.limited:
                self._files.empty_slot(file)
            locked.append(file)
            if len(locked) == at_most:
                break
        return locked

    def close(self) -> None:
        """Release all files, and the folder."""
        self._locks.close()
        self._held.close()

    def _lock(self, file: int) -> bool:
        try:
            flags = fcntl.LOCK_EX | fcntl.LOCK_NB
            fcntl.lockf(self._locks, flags, 1, self._files.slot(file))
        # POSIX allows both errors for a lock that another process holds.
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            log.warning("%s cannot be locked: %s", self._locks.name, error.strerror)
        return True

    def _unlock(self, file: int) -> None:
        fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, self._files.slot(file))


class SignalWorker:
    """Writes files of signals beside other workers. All ranks call each method together.

    Args:
        files: the files of signals.
        count: number of files that training will read.
        maker: computes the signals; all ranks run it equally often.
        corpus: the sequences.
        world: the ranks of this worker.

    Attributes:
        missing: number of files that did not exist at the start.

    Raises:
        InputError: the folder cannot be written to.
    """

    def __init__(
        self, files: SignalFiles, count: int, maker: SignalMaker, corpus: PackedCorpus, world: World
    ) -> None:
        self.files = files
        self.count = count
        self.maker = maker
        self._corpus = corpus
        self._world = world
        # All files before this number exist, or were read.
        self._ready = 0
        # Number of the first file that the student still reads, if this worker is the student's.
        self._moved_to = -1
        # Only rank 0 looks and locks, so all ranks work on the same files.
        self._claims = world.together(lambda: _Claims(files, count) if world.is_main else None)
        self.missing = world.on_main(
            lambda: sum(1 for _ in files.missing(files.first_read(), count))
        )
        if self.missing:
            log.info(
                "teacher signals: %d sequences to run, %d files of %d are made, in %s",
                self.missing * SEQUENCES_A_FILE,
                count - self.missing,
                count,
                files.folder,
            )

    def fill(self, wanted: int, advance: Advance = lambda text: None) -> None:
        """Write files until the first `wanted` exist.

        It makes the files of a worker that died. While other workers are making what it waits for,
        it makes later files. The watchdog ends a wait for a file that never comes, but no wait for
        the student.

        Args:
            wanted: number of files that are needed now, at most `count`.
            advance: called for each file that this worker has written.

        Raises:
            InputError: a file cannot be written.
            EnvironmentFault: the disk is full.
            Interrupted: a rank was asked to stop; complete files are kept.
        """
        awaited = -1
        is_logged = False
        while self._ready < wanted:
            self._leave_if_requested()
            self._ready, numbers, is_full = self._world.on_main(lambda: self._claim(wanted))
            if numbers:
                self._make(numbers)
                for _ in numbers:
                    advance("")
            elif is_full:
                if not is_logged:
                    log.info("distill.cache_gib is reached: waiting for distill to read the files")
                is_logged = True
                # A student may take hours for a file, so each poll counts as progress.
                phase("waiting for distill to read signals")
                time.sleep(_POLL_SECONDS)
            elif self._ready < wanted:
                # A wait is reported to the watchdog once, so it ends if a worker hangs.
                if awaited != self._ready:
                    awaited = self._ready
                    phase(f"waiting for another worker's file {self.files.path(awaited)}")
                time.sleep(_POLL_SECONDS)

    def move(self, first: int) -> None:
        """Let later files take the place of those before number `first`. The student calls it.

        Without a limit of the cache it does nothing.

        Raises:
            InputError: the folder cannot be written to.
            EnvironmentFault: the disk is full, or the file system has no locks.
        """
        if not self.files.limited or first == self._moved_to:
            return
        self._moved_to = first
        # First all ranks close their files: a removed file needs its space while it is open.
        self._world.together(self.files.close)
        self._world.on_main(lambda: cast(_Claims, self._claims).move(first))

    def finish(self) -> None:
        """Remove all files if there is a limit. The student calls it when it needs none.

        Raises:
            InputError: a file cannot be removed.
            EnvironmentFault: the disk is full.
        """
        if self.files.limited:
            self.files.close()
            self._world.on_main(self.files.remove_all)

    def close(self) -> None:
        """Release all files, and the folder."""
        if self._claims is not None:
            self._claims.close()

    def _claim(self, wanted: int) -> tuple[int, list[int], bool]:
        return cast(_Claims, self._claims).next(wanted, self._world.size)

    def _make(self, numbers: Sequence[int]) -> None:
        """Make one file on each rank, from the same batches on any number of ranks."""
        # A rank without a file runs the first one too: a sharded teacher needs all ranks.
        has_own = self._world.rank < len(numbers)
        own = numbers[self._world.rank] if has_own else numbers[0]
        places = self.files.places(own)
        longest = max(len(self.files.places(number)) for number in numbers)
        size = self.maker.section.micro_batch_size_per_gpu
        parts = []
        for start in range(0, longest, size):
            # A file may take minutes, and a job that is stopped has seconds.
            self._leave_if_requested()
            counted = places[start : start + size]
            phase(f"teacher signals: file {own}")
            # The last file may be shorter, and its rank then repeats a batch.
            sequences = self._corpus.numbers_at(counted or places[:size])
            input_ids_BT = self._corpus.sequences(sequences).to(self._world.device)
            made = self.maker.make(sequences, input_ids_BT, self._corpus.positions(input_ids_BT))
            if counted:
                parts.append(made)
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        # If one rank cannot write, all stop. Else the others would wait in a collective.
        self._world.together(lambda: self.files.write(own, tensors) if has_own else None)

    def _leave_if_requested(self) -> None:
        if stop_requested(self._world):
            raise stopped("the teacher signals written so far are kept")
