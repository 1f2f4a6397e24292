"""Batches of the corpus as the models read them: tokens, labels and positions.

Shapes: B sequences, T tokens.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from post_dist.config.schema import RunConfig
from post_dist.data.corpus import PackedCorpus
from post_dist.data.masking import Masking, next_token_labels
from post_dist.data.order import RankBatch
from post_dist.models.language_model import LanguageModel


@dataclass(frozen=True)
class CorpusBatch:
    """Sequences as both models read them.

    Attributes:
        numbers: the numbers of the B sequences in the corpus.
        input_ids_BT: the tokens, masked for a masked model.
        labels_BT: the token that each position should predict; -100 where there is none.
        positions_BT: positions of the tokens where documents are kept apart, else None.
    """

    numbers: list[int]
    input_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    positions_BT: torch.Tensor | None

    def __getitem__(self, sequences: slice) -> "CorpusBatch":
        """Return some of the sequences, without copying them."""
        positions_BT = self.positions_BT
        return CorpusBatch(
            self.numbers[sequences],
            self.input_ids_BT[sequences],
            self.labels_BT[sequences],
            None if positions_BT is None else positions_BT[sequences],
        )


class DistillationText:
    """Reads batches of the corpus.

    Args:
        corpus: the packed sequences.
        masking: masks the text of a masked model; None for a causal model.
        device: device of the batches.
    """

    def __init__(self, corpus: PackedCorpus, masking: Masking | None, device: torch.device) -> None:
        self.corpus = corpus
        self._masking = masking
        self._device = device

    @property
    def is_masked(self) -> bool:
        """Whether the text is masked."""
        return self._masking is not None

    def training(self, rank_batch: RankBatch) -> CorpusBatch:
        """Return the training sequences at the places of a micro-batch."""
        numbers = self.corpus.numbers(rank_batch)
        return self._read(numbers, self.corpus.sequences(numbers), rank_batch.rows)

    def held_out(self, rank_batch: RankBatch) -> CorpusBatch:
        """Return the held-out sequences of a micro-batch."""
        first = self.corpus.num_training_sequences
        numbers = [first + row for row in rank_batch.rows]
        # Training uses places from 0. Negative places give the held-out split masks of its own.
        places = [-1 - row for row in rank_batch.rows]
        return self._read(numbers, self.corpus.held_out(rank_batch), places)

    def _read(
        self, numbers: list[int], sequences_BT: torch.Tensor, places: list[int]
    ) -> CorpusBatch:
        # A causal model predicts the next token of the text as it is.
        if self._masking is None:
            input_ids_BT = sequences_BT.to(self._device)
            labels_BT = next_token_labels(sequences_BT).to(self._device)
            return CorpusBatch(
                numbers, input_ids_BT, labels_BT, self.corpus.positions(input_ids_BT)
            )
        # A masked model reads packed documents together. Its positions cannot keep them apart.
        masked_BT, labels_BT = self._masking(sequences_BT, places)
        return CorpusBatch(numbers, masked_BT.to(self._device), labels_BT.to(self._device), None)


def masking_for(
    teacher: LanguageModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> Masking | None:
    """Return the masking of the text for a masked teacher, or None for a causal one."""
    if not teacher.masked:
        return None
    return Masking(tokenizer.mask_token_id, len(tokenizer), config.distill.mask_share, config.seed)
