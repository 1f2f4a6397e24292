"""Size of a model, from its config.json alone: the model is built on the meta device.

Shapes: d width, V vocabulary.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from post_dist.config.stages import LoraSettings
from post_dist.errors import InputError
from post_dist.models.facts import ModelFacts, facts_of, meta_model
from post_dist.models.families import AttentionWidths, attention_widths, experts_per_token
from post_dist.models.language_model import LanguageModel
from post_dist.models.lora_layers import chosen_shapes


@dataclass(frozen=True)
class LayerSize:
    """Size of one transformer layer.

    Attributes:
        weights: number of elements of each of its parameters.
        attention: number of elements of the attention projections. Each token is multiplied by all
            of them.
        mlp: number of elements of all other matrix products that a token is multiplied by: the MLP,
            or a router, the shared expert and the experts that the router chooses.
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
        attention: widths of the states that attention reads and makes.
        mlp_width: largest output width of the matrix products of a token in a layer.
        shares_prompt: whether the attention lets examples share one run of a prompt. A few families
            still cannot do it (see `LanguageModel.shares_prompt`).
    """

    facts: ModelFacts
    layers: tuple[LayerSize, ...]
    others: tuple[int, ...]
    head: int
    attention: AttentionWidths
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
        linears = tuple(self.facts.linears[number] for number in numbers)
        facts = replace(self.facts, layers=len(layers), linears=linears)
        return replace(self, layers=layers, facts=facts)

    def lora_values(self, settings: LoraSettings) -> int:
        """Return the number of values of a LoRA on this model."""
        shapes = chosen_shapes(self.facts.linears, settings)
        return settings.r * sum(sum(shape) for shape in shapes.values())

    def upper_layers(self, count: int | None) -> tuple[LayerSize, ...]:
        """Return the sizes of the last `count` layers; of all of them without a number."""
        return self.layers[-(count or len(self.layers)) :]

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
    config = model.model.config
    products = [_products(layer, config) for layer in model.layers]
    return ModelSize(
        facts=facts_of(model),
        layers=tuple(map(_layer_size, model.layers, products)),
        others=_sizes_outside_layers(model),
        head=_head_size(model),
        attention=attention_widths(config),
        mlp_width=max(product.width for of_layer in products for product in of_layer),
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


@dataclass(frozen=True)
class _Product:
    """A matrix product of a layer.

    Attributes:
        name: name of its module in the layer.
        elements: number of elements that each token is multiplied by.
        width: width of its output.
    """

    name: str
    elements: int
    width: int


def _products(layer: nn.Module, config: PretrainedConfig) -> list[_Product]:
    """Return the matrix products of a layer.

    Raises:
        InputError: the layer has experts, and its configuration does not say how many run.
    """
    found = []
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            found.append(_Product(name, module.weight.numel(), _output_width(module)))
            continue
        for own, weight in module.named_parameters(recurse=False):
            if weight.dim() == 3:
                found.append(_experts_product(name, weight, config))
            elif weight.dim() == 2 and own == "weight":
                # Routers are no nn.Linear, because they also choose the experts.
                found.append(_Product(name, weight.numel(), len(weight)))
    return found


def _experts_product(name: str, weight: nn.Parameter, config: PretrainedConfig) -> _Product:
    """Return the product of a token with one weight [experts, ., .] of the experts that it has."""
    running = experts_per_token(config)
    if running is None:
        raise InputError(
            f"{config.model_type}: its config.json does not say how many experts a token has",
            "use a model of another family",
        )
    # One side of the matrix of an expert is the width of the model.
    elements = running * weight[0].numel()
    width = elements // config.get_text_config().hidden_size
    return _Product(name, elements, width)


def _output_width(product: nn.Linear | Conv1D) -> int:
    """Return the output width of a matrix product. GPT-2's Conv1D stores its weight transposed."""
    rows, columns = product.weight.shape
    return int(columns if isinstance(product, Conv1D) else rows)


def _layer_size(layer: nn.Module, products: list[_Product]) -> LayerSize:
    # All families have one of these names for attention. Other products count as MLP.
    attention = 0
    mlp = 0
    for product in products:
        if "attn" in product.name or "attention" in product.name:
            attention += product.elements
        else:
            mlp += product.elements
    weights = tuple(parameter.numel() for parameter in layer.parameters())
    return LayerSize(weights, attention, mlp)
