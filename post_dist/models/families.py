"""What families of models do differently, read from their configuration or their modules.

Every rule that depends on a family's own names is here. To support a new family, look through this
file, and through `model_checks.py` for what is found by trying.
"""

import math
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from post_dist.errors import InputError

_LOGIT_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier")
"""What Granite, Cohere and Falcon-H1 call the scale of their logits."""

_CONTEXT_LENGTHS = ("max_position_embeddings", "max_seq_len")
"""What most families, and MPT, call the number of positions. BLOOM has no limit."""

_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert")
"""Families that start to count positions behind the index of the padding token."""


@dataclass(frozen=True)
class AttentionWidths:
    """Widths of the projections in a layer's attention.

    Attributes:
        query: query heads times their width.
        key: key heads times their width; the same for values.
    """

    query: int
    key: int


def context_length(config: PretrainedConfig) -> float:
    """Return the most tokens that the positions of a model reach; infinite without a limit."""
    # RoBERTa with a padding index of 1 and 514 positions reads 512 tokens.
    reserved = 0
    if config.model_type in _POSITIONS_AFTER_PADDING:
        reserved = (config.pad_token_id or 0) + 1
    for name in _CONTEXT_LENGTHS:
        if hasattr(config, name):
            positions: float = getattr(config, name)
            return positions - reserved
    return math.inf


def logit_cap(config: PretrainedConfig) -> float | None:
    """Return the soft cap that Gemma 2 puts on its logits; other families have none."""
    return getattr(config.get_text_config(), "final_logit_softcapping", None)


def scales_logits(config: PretrainedConfig) -> bool:
    """Whether a family multiplies its logits by a constant."""
    settings = config.get_text_config()
    return any(getattr(settings, name, None) not in (None, 1.0) for name in _LOGIT_SCALES)


def scales_attention_by_layer(config: PretrainedConfig) -> bool:
    """Whether the number of a layer changes its attention, as an option of GPT-2 does."""
    return bool(getattr(config, "scale_attn_by_inverse_layer_idx", False))


def layer_kinds(config: PretrainedConfig) -> list[str]:
    """Return the kind of attention of each layer; empty for families with one kind."""
    return list(getattr(config, "layer_types", None) or [])


def attention_widths(config: PretrainedConfig) -> AttentionWidths:
    """Return the widths of the attention's projections; some families share keys among heads."""
    settings = config.get_text_config()
    # Gemma's heads are wider than width / heads. Only grouped queries have a number of key heads.
    heads = settings.num_attention_heads
    head_width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    key_heads = getattr(settings, "num_key_value_heads", None) or heads
    return AttentionWidths(query=heads * head_width, key=key_heads * head_width)


def mlp_of(layer: nn.Module) -> nn.Module | None:
    """Return the MLP of a layer; None in families that do not have it as one module `mlp`."""
    mlp: nn.Module | None = getattr(layer, "mlp", None)
    return mlp


def head_name(model: PreTrainedModel) -> str:
    """Return the name of the one module beside the trunk.

    Raises:
        InputError: there is none, or there are several.
    """
    # Models without a head have no trunk inside of them.
    names = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    if model.base_model is model or len(names) != 1:
        raise InputError(
            f"{type(model).__name__} is not one trunk with one head, "
            "so its head cannot be told apart",
            "use a model of another family",
        )
    return names[0]


def layer_list_name(model: PreTrainedModel) -> str:
    """Return the name of the one ModuleList that holds the transformer layers.

    Raises:
        InputError: there is none, or there are several.
    """
    # The layers are told from other lists by their number.
    wanted = model.config.get_text_config().num_hidden_layers
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            found.append(name)
    if len(found) != 1:
        raise InputError(
            f"{type(model).__name__} keeps its {wanted} layers in {len(found)} lists, not in one",
            "use a model of another family",
        )
    return found[0]
