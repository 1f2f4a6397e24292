"""Differences between model families, read from their configuration or their modules.

Every rule that depends on names of a family is here. To support a new family, check the rules in
this file. Also check `model_checks.py`, whose rules run the model.
"""

import inspect
import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from post_dist.errors import InputError

_LOGIT_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier")
"""Configuration fields for the scale of the logits, in Granite, Cohere and Falcon-H1."""

_CONTEXT_LENGTHS = ("max_position_embeddings", "max_seq_len")
"""Configuration fields for the number of positions: most families, then MPT. BLOOM has none."""

_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
"""Configuration fields for the number of experts that compute each token."""

_ROTARY_BY_LENGTH = ("dynamic", "longrope")
"""Kinds of rotary embeddings whose frequencies depend on the length of a sequence."""


@dataclass(frozen=True)
class AttentionWidths:
    """Widths of the states that attention reads and makes in a layer.

    Attributes:
        query: number of query heads times the width of a query.
        key: number of key heads times the width of a key, which is that of a query.
        value: number of key heads times the width of a value.
        output: number of query heads times the width of a value.
    """

    query: int
    key: int
    value: int
    output: int


def is_language_model(config: PretrainedConfig) -> bool:
    """Return whether transformers has a causal or masked model of this type, in one part."""
    family = config.model_type
    known = family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    known |= family in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return known and not config.is_encoder_decoder


def is_masked(config: PretrainedConfig) -> bool:
    """Return whether a model is a masked language model.

    The `architectures` of its configuration say so. If they name neither a masked nor a causal
    class, as those of older BERTs do, an encoder is a masked language model.
    """
    names = config.architectures or []
    if any(name.endswith("ForMaskedLM") for name in names):
        return True
    named_causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    return is_encoder(config) and not named_causal


def is_encoder(config: PretrainedConfig) -> bool:
    """Return whether each token of a model attends to all others, as in BERT."""
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and getattr(config, "is_decoder", None) is False


def context_length(config: PretrainedConfig) -> float:
    """Return the largest number of tokens that a model can take; infinite without a limit.

    Some models change the frequencies of all positions where a sequence is longer than those of
    their first training. A text's scores would then depend on the texts beside it.
    """
    return min(_positions(config), _positions_with_one_frequency(config))


def _positions(config: PretrainedConfig) -> float:
    for name in _CONTEXT_LENGTHS:
        if hasattr(config, name):
            positions: float = getattr(config, name)
            return positions
    return math.inf


def positions_after_padding(model: PreTrainedModel) -> float:
    """Return the number of positions where they start after the index of the padding token.

    RoBERTa with padding index 1 and 514 positions can take 512 tokens. Infinite in other families.
    """
    limits = [math.inf]
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and name.endswith("position_embeddings")
        if is_table and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits)


def _positions_with_one_frequency(config: PretrainedConfig) -> float:
    rotary = getattr(config, "rope_parameters", None) or {}
    # Some families have other parameters for each kind of layer.
    kinds = [each for each in rotary.values() if isinstance(each, dict)] or [rotary]
    limits = [math.inf]
    for kind in kinds:
        if kind.get("rope_type") not in _ROTARY_BY_LENGTH:
            continue
        trained = kind.get("original_max_position_embeddings")
        trained = trained or getattr(config, "original_max_position_embeddings", None)
        limits.append(trained or config.max_position_embeddings)
    return min(limits)


def logit_cap(config: PretrainedConfig) -> float | None:
    """Return the soft cap on the logits of Gemma 2; None in families without one."""
    return getattr(config.get_text_config(), "final_logit_softcapping", None)


def has_local_attention(config: PretrainedConfig) -> bool:
    """Return whether some layers use sliding-window or chunked attention."""
    settings = config.get_text_config()
    kinds = layer_kinds(settings)
    if kinds:
        return any("sliding" in kind or "chunked" in kind for kind in kinds)
    uses = getattr(settings, "use_sliding_window", True)
    return bool(uses and getattr(settings, "sliding_window", None))


def scales_logits(config: PretrainedConfig) -> bool:
    """Return whether a model multiplies its logits by a constant."""
    settings = config.get_text_config()
    return any(getattr(settings, name, None) not in (None, 1.0) for name in _LOGIT_SCALES)


def scales_attention_by_layer(config: PretrainedConfig) -> bool:
    """Return whether attention depends on the index of the layer, an option of GPT-2."""
    return bool(getattr(config, "scale_attn_by_inverse_layer_idx", False))


def layer_kinds(config: PretrainedConfig) -> list[str]:
    """Return the kind of attention of each layer; empty if all layers have the same kind."""
    return list(getattr(config, "layer_types", None) or [])


def attention_widths(config: PretrainedConfig) -> AttentionWidths:
    """Return the widths of attention. Some families share keys among heads.

    In multi-head latent attention, values are narrower than queries and keys.
    """
    settings = config.get_text_config()
    # Gemma's heads are wider than width / heads. Only families with grouped-query attention set a
    # number of key heads.
    heads = settings.num_attention_heads
    width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    key_heads = getattr(settings, "num_key_value_heads", None) or heads
    value_width = width
    if getattr(settings, "kv_lora_rank", None):
        width = settings.qk_nope_head_dim + settings.qk_rope_head_dim
        value_width = settings.v_head_dim
    return AttentionWidths(
        query=heads * width,
        key=key_heads * width,
        value=key_heads * value_width,
        output=heads * value_width,
    )


def experts_per_token(config: PretrainedConfig) -> int | None:
    """Return how many experts of a layer compute each token; None if the family does not say."""
    settings = config.get_text_config()
    for name in _EXPERTS_PER_TOKEN:
        count = getattr(settings, name, None)
        if isinstance(count, int):
            return count
    return None


def mlp_of(layer: nn.Module) -> nn.Module | None:
    """Return the MLP of a layer; None in families without a module named `mlp`."""
    mlp = getattr(layer, "mlp", None)
    return mlp if isinstance(mlp, nn.Module) else None


def generates_from_embeddings(model: PreTrainedModel) -> bool:
    """Return whether `generate` takes embeddings for tokens, by the rule of transformers."""
    prepare: Any = getattr(model, "prepare_inputs_for_generation", None)
    return prepare is not None and "inputs_embeds" in inspect.signature(prepare).parameters


def head_name(model: PreTrainedModel) -> str:
    """Return the name of the head: the only child module besides the trunk.

    Raises:
        InputError: there is no such module, or there are several.
    """
    # A model without a head is its own trunk.
    names = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    if model.base_model is model or len(names) != 1:
        raise InputError(
            f"{type(model).__name__}: the model is not made of one trunk and one head",
            "use a model of another family",
        )
    return names[0]


def layer_list_name(model: PreTrainedModel) -> str:
    """Return the name of the ModuleList that holds the transformer layers.

    Raises:
        InputError: there is no such list, or there are several.
    """
    # The list of layers is recognized by its length.
    wanted = model.config.get_text_config().num_hidden_layers
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            found.append(name)
    if len(found) != 1:
        raise InputError(
            f"{type(model).__name__}: {len(found)} module lists have {wanted} entries, so the "
            "list of its layers is unknown",
            "use a model of another family",
        )
    return found[0]
