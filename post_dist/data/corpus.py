"""Public text for distillation: tokenised once, packed into equal sequences, in an order that a seed fixes.

Shapes: B sequences, T tokens.
"""

import logging
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from post_dist.config.sources import Corpus as CorpusSection
from post_dist.config.sources import placeholders
from post_dist.data.order import RankBatch, rank_batches, shuffled_rows
from post_dist.data.sources import read_columns, texts_of
from post_dist.errors import InputError
from post_dist.files import write_file
from post_dist.runtime.distributed import World
from post_dist.runtime.watchdog import phase, unwatched

log = logging.getLogger(__name__)

_DOCUMENTS_AT_ONCE = 1000


class Corpus:
    """Packed sequences [N, T] on disk, read by memory map; the last `held_out` of them are never trained on."""

    def __init__(self, path: Path, held_out: int, seed: int, separator: int | None) -> None:
        self.path = path
        self._separator = separator
        self._sequences = np.load(path, mmap_mode="r")
        self._held_out = held_out
        self._seed = seed

    @property
    def keeps_apart(self) -> bool:
        """Whether a token sees its own document alone."""
        return self._separator is not None

    @property
    def num_training_sequences(self) -> int:
        """How many sequences are trained on."""
        return len(self._sequences) - self._held_out

    def step_shares(
        self, step: int, batch_size: int, at_most: int, world: World
    ) -> list[RankBatch]:
        """This rank's part of the batch of a step, as places in an endless reading of the training sequences.

        A function of the seed and the step alone: nothing to save, and the batch does not depend on the ranks.
        """
        return rank_batches(
            range(step * batch_size, (step + 1) * batch_size), at_most, world.rank, world.size
        )

    def numbers(self, share: RankBatch) -> list[int]:
        """The numbers of the sequences at the places of a share."""
        return [
            number
            for place in share.rows
            for number in shuffled_rows(place, 1, self.num_training_sequences, self._seed)
        ]

    def numbers_of_first(self, places: int) -> list[int]:
        """The numbers of the sequences that the first places of the reading name, in rising order."""
        return sorted(
            shuffled_rows(
                0, min(places, self.num_training_sequences), self.num_training_sequences, self._seed
            )
        )

    def training(self, share: RankBatch) -> torch.Tensor:
        """The sequences [B, T] at the places of a share."""
        return self.sequences(self.numbers(share))

    def held_out_shares(self, at_most: int, world: World) -> list[RankBatch]:
        """This rank's part of the held-out sequences, by their numbers."""
        return rank_batches(range(self._held_out), at_most, world.rank, world.size)

    def held_out(self, share: RankBatch) -> torch.Tensor:
        """The held-out sequences [B, T] of a share."""
        return self.sequences([self.num_training_sequences + number for number in share.rows])

    def sequences(self, numbers: list[int]) -> torch.Tensor:
        """Sequences [B, T] by their numbers."""
        return torch.from_numpy(self._sequences[numbers].astype(np.int64))

    def positions(self, input_ids_BT: torch.Tensor) -> torch.Tensor | None:
        """Each token's place [B, T] in its own document, as far as the sequence shows it; None when documents are not kept apart."""
        if self._separator is None:
            return None
        places_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
        begins_BT = torch.zeros_like(input_ids_BT)
        begins_BT[:, 1:] = torch.where(input_ids_BT[:, :-1] == self._separator, places_T[1:], 0)
        return places_T - begins_BT.cummax(dim=1).values


def build_corpus(
    section: CorpusSection, tokenizer: PreTrainedTokenizerBase, path: Path, seed: int, world: World
) -> Corpus:
    """Tokenise and pack the text once into `path`; other ranks, and later starts, read what is there.

    Documents follow each other with an end-of-text token between them, and are cut into sequences of `sequence_length`.

    Raises:
        InputError: the text is too short.
    """
    world.on_main(partial(_write_packed, section, tokenizer, path))
    corpus = Corpus(
        path,
        section.held_out_sequences,
        seed,
        _separator(tokenizer) if section.separate_documents else None,
    )
    log.info(
        "corpus: %d sequences of %d tokens to train on, %d held out",
        corpus.num_training_sequences,
        section.sequence_length,
        section.held_out_sequences,
    )
    return corpus


def _write_packed(section: CorpusSection, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    if path.exists():
        return
    sequences = _pack(section, tokenizer)
    if len(sequences) <= section.held_out_sequences:
        raise InputError(
            f"corpus: {len(sequences)} sequences in all, and {section.held_out_sequences} to be held out",
            "give more text, a shorter sequence_length or fewer held_out_sequences",
        )
    write_file(path, lambda file: np.save(file, sequences))


def _pack(section: CorpusSection, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    with unwatched("reading the corpus"):
        table = read_columns(section, placeholders(section.text), section.hub_split, "corpus")
    texts = texts_of(table, section.text)[: section.max_rows]
    separator = _separator(tokenizer)
    parts: list[np.ndarray] = []  # four bytes a token, a ninth of a list of integers
    wanted, made = section.max_tokens or float("inf"), 0
    for start in range(0, len(texts), _DOCUMENTS_AT_ONCE):
        phase(f"tokenising the corpus, {start} of {len(texts)} documents done")
        documents = tokenizer(
            texts[start : start + _DOCUMENTS_AT_ONCE], add_special_tokens=False
        ).input_ids
        parts.append(
            np.fromiter(
                chain.from_iterable((*tokens, separator) for tokens in documents), dtype=np.int32
            )
        )
        made += len(parts[-1])
        if made >= wanted:
            break
    stream = np.concatenate(parts)[: section.max_tokens]
    count = len(stream) // section.sequence_length
    return stream[: count * section.sequence_length].reshape(count, section.sequence_length)


def _separator(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands between two documents."""
    return int(
        tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    )
