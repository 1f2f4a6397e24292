"""Public text for distillation, tokenized once and packed into sequences of equal length.

The order in which training reads the sequences is a function of the seed, so no state is saved.

Shapes: B sequences, T tokens.
"""

import logging
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from post_dist.config.sources import Corpus as CorpusSection
from post_dist.data.order import RankBatch, rank_batches, shuffled_rows
from post_dist.data.sources import read_rows
from post_dist.errors import InputError
from post_dist.files import write_file
from post_dist.runtime.distributed import World
from post_dist.runtime.watchdog import phase, unwatched

log = logging.getLogger(__name__)

_DOCUMENTS_AT_ONCE = 1000
"""Documents in one call of the tokenizer."""


class Corpus:
    """Packed sequences on disk, read through a memory map. The last ones are the held-out split.

    Args:
        path: a .npy file of tokens, one sequence in each row.
        held_out: number of held-out sequences, which training never reads.
        seed: seed of the reading order.
        separator: token at the end of each document, to keep documents apart. None if a token may
            attend to earlier documents.
    """

    def __init__(self, path: Path, held_out: int, seed: int, separator: int | None) -> None:
        self.path = path
        self._held_out = held_out
        self._seed = seed
        self._separator = separator
        self._sequences = np.load(path, mmap_mode="r")

    @property
    def keeps_apart(self) -> bool:
        """Whether a token attends only to its own document."""
        return self._separator is not None

    @property
    def num_training_sequences(self) -> int:
        """Number of sequences that training reads."""
        return len(self._sequences) - self._held_out

    def step_batches(
        self, step: int, batch_size: int, micro_batch_size: int, world: World
    ) -> list[RankBatch]:
        """Return this rank's micro-batches of a step.

        Their rows are places in an endless reading order of the training sequences, which each
        epoch shuffles anew. The places depend only on the step. The whole batch does not depend on
        the number of ranks.

        Args:
            step: number of the step, from 0.
            batch_size: sequences in a step, over all ranks.
            micro_batch_size: most sequences in one forward pass of a rank.
            world: the ranks.
        """
        # No state is saved, because a resumed run computes its place from the step.
        places = range(step * batch_size, (step + 1) * batch_size)
        return rank_batches(places, micro_batch_size, world.rank, world.size)

    def numbers(self, batch: RankBatch) -> list[int]:
        """Return the numbers of the sequences at the places of a micro-batch."""
        numbers: list[int] = []
        for place in batch.rows:
            numbers += shuffled_rows(place, 1, self.num_training_sequences, self._seed)
        return numbers

    def numbers_of_first(self, places: int) -> list[int]:
        """Return the numbers of the sequences at the first `places` places, ascending."""
        # One epoch contains every sequence.
        count = min(places, self.num_training_sequences)
        return sorted(shuffled_rows(0, count, self.num_training_sequences, self._seed))

    def training(self, batch: RankBatch) -> torch.Tensor:
        """Return the training sequences [B, T] of a micro-batch."""
        return self.sequences(self.numbers(batch))

    def held_out_batches(self, micro_batch_size: int, world: World) -> list[RankBatch]:
        """Return this rank's micro-batches of the held-out split. Rows count from 0 within it."""
        return rank_batches(range(self._held_out), micro_batch_size, world.rank, world.size)

    def held_out(self, batch: RankBatch) -> torch.Tensor:
        """Return the held-out sequences [B, T] of a micro-batch."""
        return self.sequences([self.num_training_sequences + number for number in batch.rows])

    def sequences(self, numbers: list[int]) -> torch.Tensor:
        """Return sequences [B, T] by their numbers."""
        return torch.from_numpy(self._sequences[numbers].astype(np.int64))

    def positions(self, input_ids_BT: torch.Tensor) -> torch.Tensor | None:
        """Return the position [B, T] of each token in its own document.

        A document that begins in an earlier sequence counts from the start of this sequence. The
        result is None if documents are not kept apart.
        """
        if self._separator is None:
            return None
        places_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
        # A document begins after a separator. The running maximum repeats its start at each token.
        after_separator_BT = input_ids_BT[:, :-1] == self._separator
        begins_BT = torch.zeros_like(input_ids_BT)
        begins_BT[:, 1:] = torch.where(after_separator_BT, places_T[1:], 0)
        return places_T - begins_BT.cummax(dim=1).values


def build_corpus(
    section: CorpusSection, tokenizer: PreTrainedTokenizerBase, path: Path, seed: int, world: World
) -> Corpus:
    """Tokenize and pack the text into `path`, unless that file exists. All ranks call it.

    Documents follow each other with an end-of-text token between them. The stream of tokens is cut
    into sequences of `sequence_length`.

    Args:
        section: the section `corpus` of the run file.
        tokenizer: the teacher's tokenizer.
        path: the .npy file to write, which all ranks can read.
        seed: seed of the reading order.
        world: the ranks; rank 0 writes.

    Raises:
        InputError: the text is too short.
    """
    # Every rank would do the same work, so rank 0 tokenizes and the others wait.
    separator = _separator(tokenizer)
    world.on_main(partial(_write_packed, section, tokenizer, separator, path))
    kept_apart = separator if section.separate_documents else None
    corpus = Corpus(path, section.held_out_sequences, seed, kept_apart)
    log.info(
        "corpus: %d sequences of %d tokens to train on, %d held out",
        corpus.num_training_sequences,
        section.sequence_length,
        section.held_out_sequences,
    )
    return corpus


def _write_packed(
    section: CorpusSection, tokenizer: PreTrainedTokenizerBase, separator: int, path: Path
) -> None:
    if path.exists():
        return
    # A later start reads this file, so its text cannot differ from that of the first start.
    sequences = _pack(section, tokenizer, separator)
    if len(sequences) <= section.held_out_sequences:
        raise InputError(
            f"corpus: the text makes {len(sequences)} sequences, "
            f"and {section.held_out_sequences} are to be held out",
            "give more text, a shorter sequence_length or fewer held_out_sequences",
        )
    write_file(path, lambda file: np.save(file, sequences))


def _pack(section: CorpusSection, tokenizer: PreTrainedTokenizerBase, separator: int) -> np.ndarray:
    """Return the packed sequences of the text as int32, one in each row."""
    with unwatched("reading the corpus"):
        rows = read_rows(section, section.hub_split, "corpus")
    texts = rows.texts[: section.max_rows]

    # An array takes four bytes for each token, a list of Python integers nine times as many.
    parts: list[np.ndarray] = []
    wanted = section.max_tokens or float("inf")
    made = 0
    for start in range(0, len(texts), _DOCUMENTS_AT_ONCE):
        # A long corpus may exceed the watchdog's limit, so each part reports its progress.
        phase(f"tokenizing the corpus, {start} of {len(texts)} documents done")
        documents = texts[start : start + _DOCUMENTS_AT_ONCE]
        parts.append(_tokens_of(documents, tokenizer, separator))
        made += len(parts[-1])
        if made >= wanted:
            break

    # Drop the last tokens, which do not fill a sequence.
    stream = np.concatenate(parts)[: section.max_tokens]
    count = len(stream) // section.sequence_length
    return stream[: count * section.sequence_length].reshape(count, section.sequence_length)


def _tokens_of(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, separator: int
) -> np.ndarray:
    """Return the tokens of documents in one array, each document with a separator at its end."""
    token_lists = tokenizer(documents, add_special_tokens=False).input_ids
    arrays = []
    for tokens in token_lists:
        arrays.append(np.asarray([*tokens, separator], dtype=np.int32))
    return np.concatenate(arrays)


def _separator(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends a document: end-of-text, or a masked model's separator."""
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    return int(tokenizer.sep_token_id)
