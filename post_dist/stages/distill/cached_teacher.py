"""A signal source that reads files, and the code that writes them by running the teacher once.

A file holds the signals of a few sequences by their numbers. It depends on no batch size, rank or
epoch, so another student of the same teacher can read it too. Each file is written by one rank and
gets its name when it is complete.

Shapes: B sequences, T tokens.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from post_dist.data.corpus import Corpus
from post_dist.data.order import RankBatch, rank_batches
from post_dist.errors import InputError
from post_dist.files import digest_of, write_file
from post_dist.losses.signals import TeacherSignal
from post_dist.runtime.distributed import World
from post_dist.runtime.progress import progress
from post_dist.runtime.stop import stop_requested, stopped
from post_dist.runtime.watchdog import phase
from post_dist.stages.distill.signal_maker import SignalMaker, read_signal

log = logging.getLogger(__name__)

_SEQUENCES_A_FILE = 64
"""Sequences in one file: few enough that an interruption loses little work."""
_OPEN_FILES = 256
"""Files that a reader keeps open. The usual limit of a process is 1,024 open files."""
_NUMBERS = "numbers"
"""Name of the tensor that holds the numbers of a file's sequences."""


@dataclass(frozen=True)
class _Place:
    """The place of the signal of one sequence: the file, and the index in it."""

    file: Path
    index: int


class CachedTeacher:
    """Reads signals from files. The teacher does not run.

    Args:
        places: where the signal of each sequence is, by the sequence's number.
        names: names of the tensors to read.
        device: device of the returned signals.
    """

    def __init__(
        self, places: dict[int, _Place], names: Sequence[str], device: torch.device
    ) -> None:
        self._places = places
        self._names = names
        self._device = device
        # Files stay open between steps, because opening one parses its header.
        self._open = lru_cache(maxsize=_OPEN_FILES)(_open_file)

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
        """
        places = [self._places[number] for number in numbers]
        tensors = {name: self._read(name, places).to(self._device) for name in self._names}
        return read_signal(tensors)

    def _read(self, name: str, places: Sequence[_Place]) -> torch.Tensor:
        parts = []
        for place in places:
            # A slice reads only this sequence from the disk.
            sequences = self._open(place.file).get_slice(name)
            parts.append(sequences[place.index : place.index + 1])
        return torch.cat(parts)


def cache_teacher(
    folder: Path, teacher_digest: str, maker: SignalMaker, corpus: Corpus, world: World
) -> CachedTeacher:
    """Run the teacher over every sequence that training will read and that no file holds yet.

    Args:
        folder: parent of the cache folders, one for each teacher, corpus and kind of signal.
        teacher_digest: digest of the teacher's files.
        maker: computes the signals; all ranks run it equally often.
        corpus: the sequences.
        world: the ranks.

    Returns:
        The reader of the files.

    Raises:
        InputError: a file cannot be read.
        Interrupted: a rank was asked to stop; complete files are kept.
    """
    cache = folder / f"teacher-signals-{_signature(teacher_digest, maker, corpus)[:8]}"
    # Another run may be adding files now. Only rank 0 looks, so all ranks see the same files.
    places = world.on_main(partial(_find_places, cache))
    section = maker.section
    read = corpus.numbers_of_first(section.steps * section.batch_size)
    missing = [number for number in read if number not in places]
    # The teacher does not run if earlier runs have written all signals.
    if missing:
        log.info(
            "teacher signals: %d sequences to run, %d are in %s", len(missing), len(places), cache
        )
        _fill(cache, missing, maker, corpus, world)
        places = world.on_main(partial(_find_places, cache))
    return CachedTeacher(places, maker.names, world.device)


def _signature(teacher_digest: str, maker: SignalMaker, corpus: Corpus) -> str:
    """Return a digest of everything that the signals depend on."""
    return digest_of(
        {
            "teacher": teacher_digest,
            "corpus": corpus.digest,
            "apart": corpus.keeps_apart,
            **maker.settings,
        }
    )


def _fill(
    cache: Path, missing: Sequence[int], maker: SignalMaker, corpus: Corpus, world: World
) -> None:
    """Write the signals of the missing sequences, a file at a time."""
    micro_batch_size = maker.section.micro_batch_size_per_gpu
    # Every rank gets equally many whole micro-batches.
    own = rank_batches(missing, micro_batch_size, world.rank, world.size)
    # A file holds whole micro-batches, so their number is rounded up.
    batches_a_file = -(-_SEQUENCES_A_FILE // micro_batch_size)
    with progress("teacher signals", len(own), show=world.is_main) as advance:
        for start in range(0, len(own), batches_a_file):
            batches = own[start : start + batches_a_file]
            numbers: list[int] = []
            parts = []
            for batch in batches:
                # A rank without sequences of its own runs too: a sharded teacher needs all ranks.
                made = _make(maker, batch, corpus, world)
                if batch.counted:
                    numbers += batch.rows
                    parts.append(made)
            # If one rank cannot write, all stop. Else the others would wait in a collective.
            world.together(partial(_write, cache, numbers, parts))
            for _ in batches:
                advance("")
            # The run stops only between files, so no finished signal is lost.
            if stop_requested(world):
                raise stopped("the teacher signals written so far are kept")


def _make(
    maker: SignalMaker, batch: RankBatch, corpus: Corpus, world: World
) -> dict[str, torch.Tensor]:
    numbers = batch.rows
    phase(f"teacher signals: sequence {numbers[0]}")
    input_ids_BT = corpus.sequences(numbers).to(world.device)
    return maker.make(numbers, input_ids_BT, corpus.positions(input_ids_BT))


def _write(cache: Path, numbers: list[int], parts: list[dict[str, torch.Tensor]]) -> None:
    """Write one file of a rank. Its name is unique, because two runs may fill one folder."""
    if not numbers:
        return
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    # Each file lists its own sequences, so there is no index that could disagree with it.
    tensors[_NUMBERS] = torch.tensor(numbers)
    file = cache / f"{numbers[0]:010d}-{uuid4().hex[:8]}.safetensors"
    write_file(file, lambda partial_file: save_file(tensors, partial_file))


def _find_places(cache: Path) -> dict[int, _Place]:
    """Return where the signal of each sequence is, by the sequence's number.

    Raises:
        InputError: a file cannot be read.
    """
    places: dict[int, _Place] = {}
    # Complete files start with a digit. A file that is still being written starts with a dot.
    for file in sorted(cache.glob("[0-9]*.safetensors")):
        try:
            with _open_file(file) as tensors:
                numbers = tensors.get_tensor(_NUMBERS).tolist()
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file} cannot be read: {error}",
                "delete this file; the next run computes its signals again",
            ) from None
        for index, number in enumerate(numbers):
            places[number] = _Place(file, index)
    return places


def _open_file(file: Path) -> Any:
    return safe_open(file, framework="pt")
