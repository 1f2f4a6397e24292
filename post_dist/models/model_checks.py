"""Checks that find out by trying, or from the settings, whether a model does what post_dist needs.

Shapes: T tokens.
"""

from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig

from post_dist.errors import InputError
from post_dist.models.families import scales_logits

if TYPE_CHECKING:  # language_model imports this file
    from post_dist.models.language_model import LanguageModel

_RELATIVE_TOLERANCE = 1e-2
"""What bf16 rounds away; a real difference is far larger."""


def agree(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two results of a model are equal but for rounding in half precision."""
    largest = float(expected.abs().max())
    return torch.allclose(
        ours, expected, rtol=_RELATIVE_TOLERANCE, atol=_RELATIVE_TOLERANCE * largest
    )


def check_no_scale(config: PretrainedConfig) -> None:
    """Check by its settings that a model that will be sharded does not scale its logits.

    `check_split` would find it out by a pass through the whole model. After that, ZeRO would keep
    weights for a second use that never comes.

    Raises:
        InputError: it scales its logits.
    """
    if scales_logits(config):
        raise _changed_logits(config.get_text_config().model_type)


def check_split(model: "LanguageModel") -> None:
    """Compare trunk and head, run separately, with the model's own forward.

    Raises:
        InputError: they differ, as for a model that scales or caps its logits in an unknown way.
    """
    # Any tokens will do; the first few are often special ones.
    input_ids = torch.arange(4, 8, device=model.model.device)[None]
    with torch.no_grad():
        ours = model.head(model(input_ids)).float()
        own_forward = model.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    if not agree(ours, own_forward.logits.float()):
        raise _changed_logits(type(model.model).__name__)


def check_documents_apart(model: "LanguageModel") -> None:
    """Compare a document behind another one with the same document at the front.

    All ranks of a sharded model call it together.

    Raises:
        InputError: they differ, as in a family whose attention ignores positions.
    """
    tokens = torch.arange(4, 12, device=model.model.device)
    one, other = tokens.view(2, 4)
    packed = torch.stack([torch.cat([one, other]), torch.cat([other, one])])
    # The positions start again with the second document.
    positions = torch.arange(4, device=tokens.device).repeat(2, 2)
    with torch.no_grad():
        hidden = model(packed, position_ids=positions).float()
    behind = hidden[0, 4:]
    at_front = hidden[1, :4]
    if not agree(behind, at_front):
        raise InputError(
            f"corpus.separate_documents: a {type(model.model).__name__} attends across packed "
            "documents all the same",
            "set corpus.separate_documents: false",
        )


def _changed_logits(model: str) -> InputError:
    return InputError(
        f"a {model} changes its logits in a way that post_dist does not know",
        "use a model of another family",
    )
