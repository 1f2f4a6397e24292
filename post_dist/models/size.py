"""Size of a model, from its config.json alone: the model is built on the meta device.

Shapes: d width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from transformers.pytorch_utils import Conv1D

from post_dist.models.facts import ModelFacts, facts_of, meta_model
from post_dist.models.families import attention_widths
from post_dist.models.language_model import LanguageModel


@dataclass(frozen=True)
class LayerSize:
    """Size of one transformer layer.

    Attributes:
        weights: number of elements of each of its parameters.
        attention: number of elements of the attention projections. Each token is multiplied by all
            of them.
        mlp: number of elements of all other matrix products.
    """

    weights: tuple[int, ...]
    attention: int
    mlp: int


@dataclass(frozen=True)
class ModelSize:
    """Sizes that determine the cost of a model.

    Attributes:
        facts: facts about the model.
        layers: sizes of its layers, from the first to the last.
        others: elements of each parameter outside the layers: embeddings, norms, an untied head.
        head: number of these elements that belong only to the head.
        attention_width: number of query heads times head width.
        kv_width: number of key heads times head width.
        mlp_width: largest output width of a matrix product in a layer.
        shares_prompt: whether the attention lets examples share one run of a prompt. A few families
            still cannot do it (see `LanguageModel.shares_prompt`).
    """

    facts: ModelFacts
    layers: tuple[LayerSize, ...]
    others: tuple[int, ...]
    head: int
    attention_width: int
    kv_width: int
    mlp_width: int
    shares_prompt: bool

    @property
    def width(self) -> int:
        """Width d of embeddings and hidden states."""
        return self.facts.width

    @property
    def vocabulary(self) -> int:
        """Number V of tokens that have an embedding."""
        return self.facts.vocabulary

    @property
    def parameters(self) -> int:
        """Number of elements of all parameters. A tied head counts once."""
        return sum(self.weights)

    @property
    def weights(self) -> tuple[int, ...]:
        """Number of elements of each parameter."""
        layer_weights: list[int] = []
        for layer in self.layers:
            layer_weights += layer.weights
        return (*layer_weights, *self.others)

    @property
    def largest_layer(self) -> int:
        """Number of elements of the largest layer or parameter outside the layers."""
        return max(*(sum(layer.weights) for layer in self.layers), *self.others)

    def cut(self, numbers: tuple[int, ...]) -> "ModelSize":
        """Return the size of a student that keeps the layers with these indices."""
        layers = tuple(self.layers[number] for number in numbers)
        return replace(self, layers=layers, facts=replace(self.facts, layers=len(layers)))

    def above(self, lower_layers: int) -> "ModelSize":
        """Return the size of a student whose lowest layers run in the teacher.

        It does not include the input embeddings, unless the head uses them.
        """
        if not lower_layers:
            return self
        return replace(self.without_one_table, layers=self.layers[lower_layers:])

    @property
    def without_one_table(self) -> "ModelSize":
        """Size without the input embeddings, or without the head. A tied table is kept."""
        if self.facts.tied:
            return self
        # Embeddings and head have equal sizes, so it does not matter which one is removed.
        others = list(self.others)
        others.remove(self.width * self.vocabulary)
        return replace(self, others=tuple(others))


def size_of(folder: Path) -> ModelSize:
    """Return the size of the model in `folder` from its config.json. No weights are needed.

    Raises:
        InputError: there is no usable config.json, or the family is not supported.
    """
    model = meta_model(folder)
    attention = attention_widths(model.model.config)
    return ModelSize(
        facts=facts_of(model),
        layers=tuple(_layer_size(layer) for layer in model.layers),
        others=_sizes_outside_layers(model),
        head=_head_size(model),
        attention_width=attention.query,
        kv_width=attention.key,
        mlp_width=max(_output_width(module) for module in _matrix_products(model.layers)),
        shares_prompt=model.takes_packing,
    )


def _sizes_outside_layers(model: LanguageModel) -> tuple[int, ...]:
    """Return the number of elements of each parameter outside the layers."""
    inside = {id(parameter) for parameter in model.layers.parameters()}
    return tuple(
        parameter.numel() for parameter in model.parameters() if id(parameter) not in inside
    )


def _head_size(model: LanguageModel) -> int:
    """Return the number of elements of the head, without those of the input embeddings."""
    # A tied head is counted with the embeddings.
    embeddings = {id(parameter) for parameter in model.model.get_input_embeddings().parameters()}
    own = [
        parameter.numel()
        for parameter in model.head_module.parameters()
        if id(parameter) not in embeddings
    ]
    return sum(own)


def _matrix_products(module: nn.Module) -> Iterator[nn.Linear | Conv1D]:
    """Yield every matrix product in a module."""
    for inner in module.modules():
        if isinstance(inner, nn.Linear | Conv1D):
            yield inner


def _output_width(product: nn.Linear | Conv1D) -> int:
    """Return the output width of a matrix product. GPT-2's Conv1D stores its weight transposed."""
    rows, columns = product.weight.shape
    return int(columns if isinstance(product, Conv1D) else rows)


def _layer_size(layer: nn.Module) -> LayerSize:
    # All families have one of these names for attention. Other products count as MLP.
    attention = 0
    mlp = 0
    for name, module in layer.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        if "attn" in name or "attention" in name:
            attention += module.weight.numel()
        else:
            mlp += module.weight.numel()
    weights = tuple(parameter.numel() for parameter in layer.parameters())
    return LayerSize(weights, attention, mlp)
