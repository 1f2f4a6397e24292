"""The keys and values that a model keeps of its tokens, which a prefix holds.

Shapes: n prompt tokens, d width.
"""

import torch

from post_dist.artifacts.prefix import Prefix, PrefixShape
from post_dist.artifacts.prefix_files import PREFIX_LIMIT_BYTES
from post_dist.conflicts import Conflict
from post_dist.models.facts import ModelFacts
from post_dist.models.language_model import LanguageModel

_NO_KEYS_AND_VALUES = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors of a model that keeps a state of another kind, or that routes tokens to experts. On the
meta device a router has no values to choose by."""


def prefix_shape(facts: ModelFacts) -> PrefixShape | None:
    """Return the shape of the keys and values that a model keeps of a token.

    Args:
        facts: facts that were read from the model's configuration.

    Returns:
        None if the model keeps anything else, or other shapes in other layers, or if that is not
        known without weights. PEFT's format has one shape for the keys and values of all layers.
    """
    model = facts.meta
    if model is None or model.masked:
        return None
    prompt_nd = torch.empty(1, model.width, device="meta")
    try:
        with torch.no_grad():
            parts = model.prefix_of(prompt_nd)
    except _NO_KEYS_AND_VALUES:
        return None
    shapes = {tuple(part.shape) for part in parts}
    if len(parts) != 2 * len(model.layers) or len(shapes) != 1:
        return None
    _, heads, tokens, width = shapes.pop()
    return PrefixShape(len(model.layers), heads, width) if tokens == 1 else None


@torch.no_grad()
def initial_prefix(model: LanguageModel, prompt_nd: torch.Tensor) -> Prefix:
    """Return the prefix that says what a prompt says, in fp32 or wider.

    Args:
        model: a causal model that has a `prefix_shape`.
        prompt_nd: the prompt.
    """
    wide = torch.promote_types(model.model.dtype, torch.float32)
    return Prefix(tuple(part[0].to(wide) for part in model.prefix_of(prompt_nd)))


def prefix_conflicts(model: ModelFacts, num_virtual_tokens: int) -> list[Conflict]:
    """Return why a prefix of some tokens cannot be tuned on a model; empty if it can."""
    hint = "set tune.adapter to prompt, head or lora, or choose a student of another family"
    if model.masked:
        return [
            Conflict(
                f"tune.adapter: prefix is for causal models, and {model.family} is a masked one, "
                "which keeps no keys and values of a prompt",
                hint,
            )
        ]
    shape = prefix_shape(model)
    if shape is None:
        return [
            Conflict(
                "tune.adapter: prefix needs keys and values of one shape in all layers, and the "
                f"configuration of {model.family} does not show that it keeps such ones",
                hint,
            )
        ]
    size = 4 * num_virtual_tokens * 2 * shape.layers * shape.token_width
    if size > PREFIX_LIMIT_BYTES:
        return [
            Conflict(
                f"a prefix of {num_virtual_tokens} tokens has {size >> 20} MiB, and no more than "
                f"{PREFIX_LIMIT_BYTES >> 20} are accepted",
                "lower tune.num_virtual_tokens",
            )
        ]
    return []
