"""A signal source that reads files of signals, which workers write by running the teacher once.

Training is a worker too. It makes a file only if it needs one that no other worker has written.

The files depend on no batch size, number of ranks or epoch, so another student of the same teacher
and seed can read them too. With `distill.cache_gib`, not all of them exist at the same time, so
each run has its own.

Shapes: B sequences, T tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from post_dist.artifacts.run_folder import sharding_settings
from post_dist.config.schema import Engine
from post_dist.data.corpus import PackedCorpus
from post_dist.files import digest_of
from post_dist.losses.signals import TeacherSignal
from post_dist.runtime.distributed import World
from post_dist.stages.distill.signal_files import (
    FORMAT,
    SEQUENCES_A_FILE,
    SignalFiles,
    files_of,
)
from post_dist.stages.distill.signal_format import files_within
from post_dist.stages.distill.signal_maker import SignalMaker, read_signal
from post_dist.stages.distill.signal_worker import SignalWorker


class CachedTeacher:
    """Reads signals from files. The teacher runs only for files that are missing.

    Args:
        worker: makes them, and waits for those that others are making.
        corpus: the sequences, whose reading order gives the places in the files.
        device: device of the returned signals.
    """

    def __init__(self, worker: SignalWorker, corpus: PackedCorpus, device: torch.device) -> None:
        self._worker = worker
        self._corpus = corpus
        self._names = worker.maker.names
        self._device = device

    def prepare(self, step: int) -> None:
        """Wait until the files of a training step exist, and make those that nobody makes.

        Args:
            step: number of the step.

        Raises:
            InputError: a file cannot be written.
            EnvironmentFault: the disk is full.
            Interrupted: a rank was asked to stop; complete files are kept.
        """
        # Steps read the places in order, and later epochs read what the first one has read.
        size = self._worker.maker.section.batch_size
        self._worker.move(step * size // SEQUENCES_A_FILE)
        self._worker.fill(min(files_of((step + 1) * size), self._worker.count))

    def finish(self) -> None:
        """Remove the files if there is a limit. Without one, other students may read them.

        Raises:
            InputError: a file cannot be removed.
            EnvironmentFault: the disk is full.
        """
        self._worker.finish()

    def signals_of(
        self,
        numbers: Sequence[int],
        input_ids_BT: torch.Tensor,
        positions_BT: torch.Tensor | None,
    ) -> TeacherSignal:
        """Return the signals of sequences, each tensor [B, T, ...].

        Args:
            numbers: the numbers of the B sequences in the corpus.
            input_ids_BT: not used.
            positions_BT: not used.

        Raises:
            EnvironmentFault: a file is missing or damaged.
        """
        places = self._corpus.places_of(numbers)
        parts = [self._worker.files.read(place, self._names) for place in places]
        tensors = {}
        for name in self._names:
            tensors[name] = torch.cat([part[name] for part in parts]).to(self._device)
        return read_signal(tensors)


@contextmanager
def signal_worker(
    run: Path,
    teacher_digest: str,
    engine: Engine,
    maker: SignalMaker,
    corpus: PackedCorpus,
    world: World,
) -> Iterator[SignalWorker]:
    """Yield a worker that writes the files that training reads. All ranks call it.

    Several workers may fill one folder at once, on other ranks or machines.

    Args:
        run: the student's run folder. The signals are in a folder beside it, one for each teacher,
            corpus and kind of signal. With `distill.cache_gib`, the run has a folder of its own.
        teacher_digest: digest of the teacher's files.
        engine: how the teacher is sharded.
        maker: computes the signals; all ranks run it equally often.
        corpus: the sequences.
        world: the ranks.

    Raises:
        InputError: the folder cannot be written to.
    """
    section = maker.section
    covered = _covered(teacher_digest, engine, maker, corpus)
    most = None
    if section.cache_gib is not None:
        most = files_within(section.cache_gib, maker.bytes_per_token, corpus.sequence_length)
        covered |= {"run": run.name, "slots": most}
    cache = run.parent / f"teacher-signals-{digest_of(covered)[:8]}"
    files = SignalFiles(cache, corpus.num_training_sequences, most)
    # One epoch contains every sequence.
    read = min(section.steps * section.batch_size, corpus.num_training_sequences)
    worker = SignalWorker(files, files_of(read), maker, corpus, world)
    try:
        yield worker
    finally:
        worker.close()


def _covered(
    teacher_digest: str, engine: Engine, maker: SignalMaker, corpus: PackedCorpus
) -> dict[str, Any]:
    """Return everything that the signals and their places depend on."""
    return {
        "format": FORMAT,
        "teacher": teacher_digest,
        "corpus": corpus.digest,
        "order": corpus.order,
        "apart": corpus.keeps_apart,
        **sharding_settings(engine),
        **maker.settings,
    }
