"""How large a model is, from its config.json alone: it is made on the meta device, where nothing has a memory.

Shapes: L layers, d width, V vocabulary.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.pytorch_utils import Conv1D

from post_dist.models.language_model import LanguageModel
from post_dist.models.load import is_masked, read_config


@dataclass(frozen=True)
class LayerSize:
    """One layer.

    Attributes:
        weights: elements of each of its parameters.
        attention: elements that one token is multiplied with in the projections to queries, keys and values and back.
        mlp: elements in its other matrix products.
    """

    weights: tuple[int, ...]
    attention: int
    mlp: int


@dataclass(frozen=True)
class ModelSize:
    """What costs depend on.

    Attributes:
        layers: from the first to the last.
        others: elements of the parameters outside the layers: embeddings, norms, the head if it is not tied.
        head: how many of these are the head's alone.
        width: d.
        vocabulary: V.
        attention_width: heads times their width.
        kv_width: the same for keys.
        mlp_width: the widest product inside a layer.
        context: most positions, or None where the configuration names none.
        tied: whether the head is the embedding.
        shares_prompt: whether rows may stand behind one run of a prompt; a few families of those that may do not (see `LanguageModel`).
    """

    layers: tuple[LayerSize, ...]
    others: tuple[int, ...]
    head: int
    width: int
    vocabulary: int
    attention_width: int
    kv_width: int
    mlp_width: int
    context: int | None
    tied: bool
    shares_prompt: bool

    @property
    def parameters(self) -> int:
        """All of them, a tied head once."""
        return sum(self.weights)

    @property
    def weights(self) -> tuple[int, ...]:
        """Elements of each parameter."""
        return tuple(numel for layer in self.layers for numel in layer.weights) + self.others

    @property
    def largest_layer(self) -> int:
        """Elements of the layer, or of the parameter outside the layers, that is largest."""
        return max(*(sum(layer.weights) for layer in self.layers), *self.others)

    def cut(self, numbers: tuple[int, ...]) -> "ModelSize":
        """A student of some of the layers."""
        return replace(self, layers=tuple(self.layers[number] for number in numbers))

    def above(self, lower_layers: int) -> "ModelSize":
        """What is left of a student whose lowest layers the teacher runs: no embedding but a tied head's either."""
        return (
            replace(self.without_one_table, layers=self.layers[lower_layers:])
            if lower_layers
            else self
        )

    @property
    def without_one_table(self) -> "ModelSize":
        """Where the embedding or the head is not needed; a tied one is the other as well."""
        others = list(self.others)
        if not self.tied:
            others.remove(self.width * self.vocabulary)
        return replace(self, others=tuple(others))


def size_of(folder: Path) -> ModelSize:
    """The size of the model whose config.json is in a folder; no weights are needed.

    Raises:
        InputError: there is no usable configuration.
    """
    config = read_config(folder)
    masked = is_masked(config)
    with torch.device("meta"):
        model = LanguageModel(
            (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_config(config),
            masked=masked,
        )
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    own = list(model.layers.children())
    layers = tuple(map(_layer, own))
    inside = {id(parameter) for parameter in model.layers.parameters()}
    embeddings = {id(parameter) for parameter in model.model.get_input_embeddings().parameters()}
    others = tuple(
        parameter.numel() for parameter in model.parameters() if id(parameter) not in inside
    )
    return ModelSize(
        layers=layers,
        others=others,
        head=sum(
            parameter.numel()
            for parameter in model.head_module.parameters()
            if id(parameter) not in embeddings
        ),
        width=model.width,
        vocabulary=model.vocabulary_size,
        attention_width=heads * head_width,
        kv_width=kv_heads * head_width,
        mlp_width=max(
            _product(module)[1]
            for layer in own
            for module in layer.modules()
            if _is_product(module)
        ),
        context=getattr(text, "max_position_embeddings", None),
        tied=model.model.get_input_embeddings().weight
        is getattr(model.model.get_output_embeddings(), "weight", None),
        shares_prompt=model.takes_packing,
    )


def _is_product(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _product(module: nn.Module) -> tuple[int, int]:
    """Width in and out of a matrix product; GPT-2's stores its weight the other way round."""
    rows, columns = tuple(module.weight.shape)  # type: ignore[arg-type]
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def _layer(layer: nn.Module) -> LayerSize:
    attention = mlp = 0
    for name, module in layer.named_modules():
        if _is_product(module):
            if "attn" in name or "attention" in name:
                attention += module.weight.numel()
            else:
                mlp += module.weight.numel()
    return LayerSize(tuple(parameter.numel() for parameter in layer.parameters()), attention, mlp)
