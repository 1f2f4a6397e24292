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
        # Positions without a label take token 0, with a mask of zero. Picking out the others would
        # wait for the GPU, which alone knows how many there are.
        has_label_B1 = (chunk.labels_B != NO_LABEL)[:, None]
        labels_B1 = chunk.labels_B[:, None].clamp(min=0)
        # No temperature here: labels are tokens of the text, not a softened distribution.
        log_q_BV = chunk.student_BV.log_softmax(dim=-1)
        # `where` and no product: the log-probability of token 0 may be minus infinity.
        log_q_B1 = torch.where(has_label_B1, log_q_BV.gather(1, labels_B1), 0.0)

        if gradient_BV is None:
            gradient_BV = torch.zeros_like(log_q_BV)
        # One pass over the logits: the mask keeps positions without a label out of the gradient.
        mask_B1 = has_label_B1.to(gradient_BV.dtype)
        gradient_BV.addcmul_(log_q_BV.exp_(), mask_B1, value=scale)
        gradient_BV.scatter_add_(1, labels_B1, -scale * mask_B1)
        return -log_q_B1.sum(), gradient_BV
