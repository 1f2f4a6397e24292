"""Facts about a model that decide what a run can do, from `config.json` or a loaded model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig

from post_dist.models.families import (
    generates_from_embeddings,
    is_masked,
    scales_attention_by_layer,
)
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import read_config
from post_dist.models.lora_layers import layer_linears
from post_dist.models.model_checks import check_config


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model that decide what a run can do with it.

    Attributes:
        family: name of the model class, such as `LlamaForCausalLM`.
        layers: number of transformer layers.
        width: width d of embeddings and hidden states.
        vocabulary: number of tokens that have an embedding.
        context_length: largest number of tokens; infinite without a limit.
        masked: whether it is a masked language model; otherwise it is causal.
        tied: whether the head and the input embeddings are one tensor.
        matrix_head: whether the head is one matrix, perhaps with a bias.
        linear_head: whether the logits are one matrix product, with no bias and no soft cap.
        scales_attention_by_layer: whether attention depends on the index of the layer.
        generates: whether it generates text behind embeddings.
        has_other_parts: whether the language model is a part of a larger one, which reads images.
        linears: outputs and inputs of the linear modules of each layer, by name in the model.
        meta: the model on the meta device, for what only a forward pass can tell; None if the facts
            were read from a loaded model.
    """

    family: str
    layers: int
    width: int
    vocabulary: int
    context_length: float
    masked: bool
    tied: bool
    matrix_head: bool
    linear_head: bool
    scales_attention_by_layer: bool
    generates: bool = True
    has_other_parts: bool = False
    linears: Sequence[Mapping[str, tuple[int, int]]] = field(default=(), compare=False)
    meta: LanguageModel | None = field(default=None, compare=False, repr=False)


def facts_of(model: LanguageModel) -> ModelFacts:
    """Return the facts about a model, which may be whole, sharded, or on the meta device."""
    inner = model.model
    input_embeddings = inner.get_input_embeddings()
    output_embeddings = inner.get_output_embeddings()
    # Some families do not tell transformers about their output embeddings.
    tied = output_embeddings is not None and output_embeddings.weight is input_embeddings.weight
    return ModelFacts(
        family=type(inner).__name__,
        layers=len(model.layers),
        width=model.width,
        vocabulary=model.vocabulary_size,
        context_length=model.context_length,
        masked=model.masked,
        tied=tied,
        matrix_head=isinstance(model.head_module, nn.Linear),
        linear_head=model.has_linear_head,
        scales_attention_by_layer=scales_attention_by_layer(inner.config),
        generates=not model.masked and generates_from_embeddings(inner),
        has_other_parts=inner.config.get_text_config() is not inner.config,
        linears=layer_linears(model),
        # A loaded model would stay in memory with its facts.
        meta=model if inner.device.type == "meta" else None,
    )


def meta_model(folder: Path) -> LanguageModel:
    """Build a model from its config.json on the meta device, where tensors need no memory.

    Raises:
        InputError: there is no usable config.json, or the family is not supported.
    """
    return meta_from_config(read_config(folder))


def meta_from_config(config: PretrainedConfig) -> LanguageModel:
    """Build the model that a configuration describes on the meta device.

    Raises:
        InputError: the family is not supported.
    """
    # A run refuses such a model too. The configuration is enough to know.
    check_config(config)
    masked = is_masked(config)
    family = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    with torch.device("meta"):
        return LanguageModel(family.from_config(config), masked=masked)


def read_facts(folder: Path) -> ModelFacts:
    """Read the facts about the model in `folder` from its config.json. No weights are needed.

    Raises:
        InputError: there is no usable config.json, or the family is not supported.
    """
    return facts_of(meta_model(folder))
