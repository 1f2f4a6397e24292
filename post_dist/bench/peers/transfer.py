"""Steps of transfer: the published loop, and one with cached logits.

Shapes: B examples, T tokens, n prompt tokens, d width, V vocabulary.
"""

from dataclasses import dataclass

import torch

from post_dist.config.schema import Transfer
from post_dist.data.template import Batch
from post_dist.losses.transfer import published_transfer_loss
from post_dist.models.language_model import LanguageModel


@dataclass(frozen=True)
class CachedLogits:
    """Logits at the answers that do not depend on the prompt that is trained, [B, V] each.

    Attributes:
        source: logits of the student without a prompt.
        source_prompted: logits of the student with the source prompt.
        target: logits of the target without a prompt.
    """

    source: torch.Tensor
    source_prompted: torch.Tensor
    target: torch.Tensor


def published_transfer_step(
    student: LanguageModel,
    target: LanguageModel,
    batch: Batch,
    source_nd: torch.Tensor,
    prompt_nd: torch.Tensor,
    section: Transfer,
) -> torch.Tensor:
    """Compute the loss of POST's utils/transfer.py.

    It runs four forward passes. Each computes the logits [B, n+T, V] of all positions and uses one
    of them per example. POST's code does more work: it also back-propagates through the
    prompted student, and runs the other forward passes with autograd on.

    Args:
        student: the student.
        target: the target.
        batch: the examples.
        source_nd: the source prompt.
        prompt_nd: the prompt that is trained.
        section: settings of the loss, with a number for `alpha`.

    Returns:
        The loss, a scalar.
    """
    with torch.no_grad():
        constants = CachedLogits(
            source=_logits_at_answers(student, batch, None),
            source_prompted=_logits_at_answers(student, batch, source_nd),
            target=_logits_at_answers(target, batch, None),
        )
    return cached_transfer_step(target, batch, constants, prompt_nd, section)


def cached_transfer_step(
    target: LanguageModel,
    batch: Batch,
    constants: CachedLogits,
    prompt_nd: torch.Tensor,
    section: Transfer,
) -> torch.Tensor:
    """Compute the published loss with less work, as an experienced PEFT user would write it.

    The constant logits are cached, and examples are padded to the longest one of the batch. The
    head still runs at all positions.

    Args:
        target: the target.
        batch: the examples.
        constants: cached logits of these examples.
        prompt_nd: the prompt that is trained.
        section: settings of the loss, with a number for `alpha`.

    Returns:
        The loss, a scalar.
    """
    return published_transfer_loss(
        constants.source,
        constants.source_prompted,
        constants.target,
        _logits_at_answers(target, batch, prompt_nd),
        alpha=float(section.alpha),
        temperature=section.temperature,
    )


def _logits_at_answers(
    model: LanguageModel, batch: Batch, prompt_nd: torch.Tensor | None
) -> torch.Tensor:
    """Compute the logits of all positions, and pick those at the answers: [B, V]."""
    logits = model.head(model(batch.input_ids, batch.attention_mask, prompt_nd))
    prompt_length = 0 if prompt_nd is None else len(prompt_nd)
    return at_answers(logits, batch, prompt_length)


def at_answers(states: torch.Tensor, batch: Batch, prompt_length: int) -> torch.Tensor:
    """Pick the states [B, ...] at the answers of states [B, n+T, ...]."""
    # The answers are counted without the prompt, which comes before each text.
    positions_B = batch.answer + prompt_length
    examples_B = torch.arange(len(positions_B), device=positions_B.device)
    return states[examples_B, positions_B]
