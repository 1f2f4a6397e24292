"""The language-modeling loss: cross-entropy of the labels.

Shapes: B positions of one chunk, N positions of the batch, V vocabulary.
"""

import torch

from post_dist.data.masking import NO_LABEL
from post_dist.losses.terms.base import LogitChunk, LogitTerm


class LabelCrossEntropy(LogitTerm):
    """Cross-entropy of the labels, the second term of the paper's eq. 1."""

    metric = "lm"
    weight_field = "alpha_lm"

    def positions(self, labels_N: torch.Tensor) -> int:
        """Return the number of positions that have a label, at least 1."""
        return int((labels_N != NO_LABEL).sum().clamp(min=1))

    def sum_and_gradient(
        self, chunk: LogitChunk, scale: float, gradient_BV: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the sum over a chunk, and add the gradient: scale (student - one-hot label).

        Args:
            chunk: the logits.
            scale: factor of the gradient.
            gradient_BV: gradient of earlier terms, or None.
        """
        # Positions without a label would index the vocabulary with -100, so they are excluded.
        has_label_B = chunk.labels_B != NO_LABEL
        labelled = has_label_B.nonzero().squeeze(1)
        labels = chunk.labels_B[labelled]
        # No temperature here: labels are tokens of the text, not a softened distribution.
        log_q_BV = chunk.student_BV.log_softmax(dim=-1)
        cross_entropy = -log_q_BV[labelled, labels].sum()

        if gradient_BV is None:
            gradient_BV = torch.zeros_like(log_q_BV)
        # One pass over the logits: the mask keeps positions without a label out of the gradient.
        mask_B1 = has_label_B[:, None].to(gradient_BV.dtype)
        gradient_BV.addcmul_(log_q_BV.exp_(), mask_B1, value=scale)
        gradient_BV[labelled, labels] -= scale
        return cross_entropy, gradient_BV
