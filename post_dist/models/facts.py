"""Facts of a model that the rules of a run need, from `config.json` or from the loaded model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from post_dist.models.families import scales_attention_by_layer
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import is_masked, read_config
from post_dist.models.model_checks import check_no_scale


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model that decide what a run can do with it.

    Attributes:
        family: name of its class, such as `LlamaForCausalLM`.
        layers: number of transformer layers.
        width: width d of embeddings and hidden states.
        vocabulary: number of tokens that have an embedding.
        context_length: most tokens that its positions reach; infinite where nothing limits them.
        masked: whether it fills in masks; otherwise it predicts the next token.
        tied: whether the head and the input embeddings are one tensor.
        matrix_head: whether the head is one matrix, perhaps with a bias.
        linear_head: whether the logits are one matrix product, with no bias and no soft cap.
        scales_attention_by_layer: whether a layer's number is part of its attention.
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


def facts_of(model: LanguageModel) -> ModelFacts:
    """Read the facts of a model: whole, sharded, or on the meta device."""
    inner = model.model
    input_embeddings = inner.get_input_embeddings()
    output_embeddings = inner.get_output_embeddings()
    # Some families have no output embeddings that transformers knows of.
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
    )


def meta_model(folder: Path) -> LanguageModel:
    """Build a model from its config.json on the meta device: tensors have shapes and no memory.

    Raises:
        InputError: there is no usable config.json, or the family is not supported.
    """
    config = read_config(folder)
    # A run refuses such a model, and its settings tell it without weights.
    check_no_scale(config)
    masked = is_masked(config)
    family = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    with torch.device("meta"):
        return LanguageModel(family.from_config(config), masked=masked)


def read_facts(folder: Path) -> ModelFacts:
    """Read the facts of the model whose config.json lies in `folder`. No weights are needed.

    Raises:
        InputError: there is no usable config.json, or the family is not supported.
    """
    return facts_of(meta_model(folder))
