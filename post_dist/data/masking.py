"""Labels of training text: the next token for causal models, the masked tokens for masked ones.

Shapes: B sequences, T tokens.
"""

from collections.abc import Sequence

import torch

from post_dist.data.seeded import seeded_generator

NO_LABEL = -100
"""Marks a position without a label, as in torch and transformers."""

_MASKED = 0.8
"""Fraction of the chosen tokens that become the mask token (BERT's rule)."""
_MASKED_OR_REPLACED = 0.9
"""The next tenth becomes random tokens, and the last tenth stays unchanged (BERT's rule)."""


def next_token_labels(input_ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the token that follows each position [B, T]; the last position has no label."""
    no_labels_B1 = torch.full_like(input_ids_BT[:, :1], NO_LABEL)
    return torch.cat([input_ids_BT[:, 1:], no_labels_B1], dim=1)


class Masking:
    """Masks a fixed number of tokens in each sequence, and labels them.

    Args:
        mask_token: id of the mask token.
        vocabulary: number of tokens from which random replacements are drawn.
        fraction: fraction of the tokens to choose, at least one in each sequence.
        seed: seed of the random choices.
    """

    def __init__(self, mask_token: int, vocabulary: int, fraction: float, seed: int) -> None:
        self._mask_token = mask_token
        self._vocabulary = vocabulary
        self._fraction = fraction
        self._seed = seed

    def __call__(
        self, input_ids_BT: torch.Tensor, places: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return masked tokens and labels, both [B, T].

        The result for a sequence depends only on the seed and the sequence's place. Training can
        therefore resume at any step.

        Args:
            input_ids_BT: tokens to mask.
            places: place of each sequence in the order in which the run reads its text.
        """
        masked = []
        labels = []
        for input_ids_T, place in zip(input_ids_BT, places, strict=True):
            masked_T, labels_T = self._mask_sequence(input_ids_T, place)
            masked.append(masked_T)
            labels.append(labels_T)
        return torch.stack(masked), torch.stack(labels)

    def _mask_sequence(
        self, input_ids_T: torch.Tensor, place: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The order of these draws must not change, or a seed would give other masks.
        generator = seeded_generator(self._seed, place)
        count = max(1, round(self._fraction * len(input_ids_T)))
        chosen = torch.rand(input_ids_T.shape, generator=generator).topk(count).indices
        draw = torch.rand(count, generator=generator)
        other = torch.randint(self._vocabulary, (count,), generator=generator)

        kept = input_ids_T[chosen]
        mask = torch.full_like(kept, self._mask_token)
        replaced_or_kept = torch.where(draw < _MASKED_OR_REPLACED, other, kept)
        changed = torch.where(draw < _MASKED, mask, replaced_or_kept)
        labels_T = torch.full_like(input_ids_T, NO_LABEL).scatter(0, chosen, kept)
        return input_ids_T.scatter(0, chosen, changed), labels_T
