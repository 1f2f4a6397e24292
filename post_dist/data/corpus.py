"""Public text for distillation, in sequences of equal length from sealed shards of tokens.

The order in which training reads the sequences is a function of the seed, so no state is saved.

Shapes: B sequences, T tokens.
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from post_dist.config.sources import Corpus
from post_dist.data.make_shards import make_shards
from post_dist.data.order import RankBatch, first_places, rank_batches, shuffled_rows
from post_dist.data.token_shards import TokenShards
from post_dist.errors import InputError
from post_dist.files import digest_of
from post_dist.runtime.distributed import World

log = logging.getLogger(__name__)


class PackedCorpus:
    """Sequences of tokens on disk. The last ones are the held-out split, which is not trained on.

    Args:
        shards: the tokens. Those at the end, which do not fill a sequence, are dropped.
        section: the section `corpus` of the run file.
        seed: seed of the reading order.
        separator: token at the end of each document, to keep documents apart. None if a token may
            attend to earlier documents.
    """

    def __init__(
        self, shards: TokenShards, section: Corpus, seed: int, separator: int | None
    ) -> None:
        self._shards = shards
        self._length = section.sequence_length
        self._held_out = section.held_out_sequences
        self._seed = seed
        self._separator = separator

    @property
    def digest(self) -> str:
        """Digest of the sequences and their numbers."""
        return digest_of({"shards": self._shards.index.digest, "length": self._length})

    @property
    def keeps_apart(self) -> bool:
        """Whether a token attends only to its own document."""
        return self._separator is not None

    @property
    def sequence_length(self) -> int:
        """Number of tokens in a sequence."""
        return self._length

    @property
    def num_training_sequences(self) -> int:
        """Number of sequences that training reads."""
        return len(self._shards) // self._length - self._held_out

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

    @property
    def order(self) -> dict[str, int]:
        """The settings on which the reading order depends."""
        return {"sequences": self.num_training_sequences, "seed": self._seed}

    def numbers(self, batch: RankBatch) -> list[int]:
        """Return the numbers of the sequences at the places of a micro-batch."""
        return self.numbers_at(batch.rows)

    def numbers_at(self, places: Sequence[int]) -> list[int]:
        """Return the numbers of the sequences at places of the reading order."""
        numbers: list[int] = []
        for place in places:
            numbers += shuffled_rows(place, 1, self.num_training_sequences, self._seed)
        return numbers

    def places_of(self, numbers: Sequence[int]) -> list[int]:
        """Return the places of sequences in the first epoch of the reading order."""
        places = first_places(self.num_training_sequences, self._seed)
        return [int(places[number]) for number in numbers]

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
        sequences = []
        for number in numbers:
            start = number * self._length
            sequences.append(self._shards.read(start, start + self._length))
        return torch.from_numpy(np.stack(sequences).astype(np.int64))

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
    section: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    corpora: Path,
    seed: int,
    world: World,
) -> PackedCorpus:
    """Read the sequences of the text, which is tokenized first if need be. All ranks call it.

    Documents follow each other with an end-of-text token between them. The stream of tokens is cut
    into sequences of `sequence_length`.

    Args:
        section: the section `corpus` of the run file.
        tokenizer: the teacher's tokenizer.
        corpora: parent of the folders of tokenized corpora, which all ranks can read.
        seed: seed of the reading order.
        world: the ranks; rank 0 writes.

    Raises:
        InputError: the text cannot be read, or is too short.
        ArtifactRefused: the tokenized corpus is not as it was written.
    """
    # Every rank would do the same work, so rank 0 tokenizes and the others wait.
    separator = document_separator(tokenizer)
    folder = world.on_main(partial(make_shards, section, tokenizer, separator, corpora))
    shards = TokenShards(folder)
    check_long_enough(section, len(shards))
    kept_apart = separator if section.separate_documents else None
    corpus = PackedCorpus(shards, section, seed, kept_apart)
    log.info(
        "corpus: %d sequences of %d tokens to train on, %d held out",
        corpus.num_training_sequences,
        section.sequence_length,
        section.held_out_sequences,
    )
    return corpus


def check_long_enough(section: Corpus, tokens: int) -> None:
    """Check that sequences are left to train on.

    Raises:
        InputError: all would be held out.
    """
    sequences = tokens // section.sequence_length
    if sequences <= section.held_out_sequences:
        raise InputError(
            f"corpus: the text makes {sequences} sequences, "
            f"and {section.held_out_sequences} are to be held out",
            "give more text, a shorter sequence_length or fewer held_out_sequences",
        )


def document_separator(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends a document: end-of-text, or a masked model's separator."""
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    return int(tokenizer.sep_token_id)
