"""A frozen language model as a classifier, tuned through a soft prompt and one bias per class.

Shapes: B examples, n prompt tokens, d width, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from post_dist.data.template import Batch
from post_dist.data.verbalizer import Verbalizer
from post_dist.models.language_model import LanguageModel

BIAS_SCALE = 0.3
"""Class bias = BIAS_SCALE * parameter. A small factor leaves the prompt most of the norm."""
BIAS_RATE = 5.0
"""Learning rate of the bias parameters, as a multiple of the prompt's."""


@dataclass(frozen=True)
class PromptInput:
    """A soft prompt in the form that a model takes: embeddings, or their keys and values.

    Attributes:
        prompt: embeddings [n, d], or [B, n, d] with one prompt for each example.
        prefix: keys and values from `LanguageModel.prefix_of`, instead of embeddings.
        shared: run a prompt [n, d] once for the whole batch; see `LanguageModel.shares_prompt`.
    """

    prompt: torch.Tensor | None = None
    prefix: Sequence[torch.Tensor] | None = None
    shared: bool = False


def word_scores(
    model: LanguageModel, verbalizer: Verbalizer
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from hidden states [B, d] to the class scores [B, C] of the label words.

    A sharded head is gathered here, once, so all ranks must call this together.
    """
    logits_of_words = model.head_of(verbalizer.tokens)
    return lambda hidden_Bd: verbalizer.scores_of_tokens(logits_of_words(hidden_Bd))


def class_losses(
    model: LanguageModel,
    verbalizer: Verbalizer,
    batch: Batch,
    classes_B: torch.Tensor,
    prompt: PromptInput,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the cross-entropy [B] of each example over the class scores.

    Args:
        model: a frozen model.
        verbalizer: maps logits to class scores.
        batch: examples on the model's device.
        classes_B: the class of each example.
        prompt: the soft prompt before each example.
        bias: bias parameters [C] or [B, C].
    """
    # Only the logits of the label words are computed.
    logits_BK = model(
        batch.input_ids,
        batch.attention_mask,
        prompt.prompt,
        batch.answer,
        prompt.prefix,
        share_prompt=prompt.shared,
        tokens=verbalizer.tokens,
    )
    scores_BC = verbalizer.scores_of_tokens(logits_BK)
    # Bias parameters have a unit of their own; see BIAS_SCALE.
    if bias is not None:
        scores_BC = scores_BC + BIAS_SCALE * bias
    return functional.cross_entropy(scores_BC, classes_B, reduction="none")
