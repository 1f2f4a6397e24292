"""A frozen language model as a classifier that is tuned through its soft prompt, and perhaps one bias per class.

Shapes: B rows, n prompt tokens, d width, C classes.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional

from post_dist.data.template import Batch
from post_dist.data.verbalizer import Verbalizer
from post_dist.models.language_model import LanguageModel

BIAS_SCALE = 0.3
"""A class bias is this times its parameter, so that its part of the clipped gradient leaves room for the prompt's."""
BIAS_RATE = 5.0
"""Learning rate of the bias parameters over that of the prompt."""


def class_losses(
    model: LanguageModel,
    verbalizer: Verbalizer,
    batch: Batch,
    classes_B: torch.Tensor,
    *,
    prompt: torch.Tensor | None = None,
    prefix: Sequence[torch.Tensor] | None = None,
    bias: torch.Tensor | None = None,
    share_prompt: bool = False,
) -> torch.Tensor:
    """Cross-entropy [B] over the class scores.

    Args:
        model: frozen.
        verbalizer: from logits to class scores.
        batch: rows on the model's device.
        classes_B: the right classes.
        prompt: [n, d] or [B, n, d].
        prefix: in its place, the keys and values of a prompt.
        bias: bias parameters [C] or [B, C].
        share_prompt: run a prompt [n, d] once for all rows.
    """
    how = {"share_prompt": share_prompt, "tokens": verbalizer.tokens}
    scores_BC = verbalizer.scores_of_tokens(
        model(batch.input_ids, batch.attention_mask, prompt, batch.answer, prefix, **how)
    )
    if bias is not None:
        scores_BC = scores_BC + BIAS_SCALE * bias
    return functional.cross_entropy(scores_BC, classes_B, reduction="none")
