"""A signal source that reads files of signals, which workers write by running the teacher once.

The files depend on no batch size, number of ranks or epoch, so another student of the same teacher
and seed can read them too.

Shapes: B sequences, T tokens.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from post_dist.data.corpus import Corpus
from post_dist.files import digest_of
from post_dist.losses.signals import TeacherSignal
from post_dist.runtime.distributed import World
from post_dist.stages.distill.signal_files import FORMAT, SignalFiles, files_of
from post_dist.stages.distill.signal_maker import SignalMaker, read_signal
from post_dist.stages.distill.signal_worker import fill


class CachedTeacher:
    """Reads signals from files. The teacher does not run.

    Args:
        files: the files.
        corpus: the sequences, whose reading order gives the places in the files.
        names: names of the tensors to read.
        device: device of the returned signals.
    """

    def __init__(
        self, files: SignalFiles, corpus: Corpus, names: Sequence[str], device: torch.device
    ) -> None:
        self._files = files
        self._corpus = corpus
        self._names = names
        self._device = device

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
        parts = [self._files.read(place, self._names) for place in places]
        tensors = {}
        for name in self._names:
            tensors[name] = torch.cat([part[name] for part in parts]).to(self._device)
        return read_signal(tensors)


def cache_teacher(
    folder: Path, teacher_digest: str, maker: SignalMaker, corpus: Corpus, world: World
) -> CachedTeacher:
    """Make every file of signals that training will read and that does not exist yet.

    Several calls may fill one folder at once, on other ranks or machines.

    Args:
        folder: parent of the cache folders, one for each teacher, corpus and kind of signal.
        teacher_digest: digest of the teacher's files.
        maker: computes the signals; all ranks run it equally often.
        corpus: the sequences.
        world: the ranks.

    Returns:
        The reader of the files.

    Raises:
        InputError: a file cannot be written.
        EnvironmentFault: the disk is full.
        Interrupted: a rank was asked to stop; complete files are kept.
    """
    cache = folder / f"teacher-signals-{_signature(teacher_digest, maker, corpus)[:8]}"
    files = SignalFiles(cache, corpus.num_training_sequences)
    section = maker.section
    # One epoch contains every sequence.
    read = min(section.steps * section.batch_size, corpus.num_training_sequences)
    fill(files, files_of(read), maker, corpus, world)
    return CachedTeacher(files, corpus, maker.names, world.device)


def _signature(teacher_digest: str, maker: SignalMaker, corpus: Corpus) -> str:
    """Return a digest of everything that the signals and their places depend on."""
    return digest_of(
        {
            "format": FORMAT,
            "teacher": teacher_digest,
            "corpus": corpus.digest,
            "order": corpus.order,
            "apart": corpus.keeps_apart,
            **maker.settings,
        }
    )
