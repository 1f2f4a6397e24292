"""The configuration of a student that keeps some layers of its teacher.

Some families describe their layers one by one, or say how many of the first ones are dense. These
fields are cut too. A student is refused if its layers would still be of other kinds.
"""

import copy

from torch import nn
from transformers import PretrainedConfig

from post_dist.errors import InputError
from post_dist.models.language_model import LanguageModel

_COUNTS_OF_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""Fields that say how many of the first layers have no experts."""

_INDICES = ("mlp_only_layers", "attn_layer_indices", "full_attn_idxs")
"""Fields that list the indices of some layers."""


def cut_config(config: PretrainedConfig, layers: tuple[int, ...]) -> PretrainedConfig:
    """Return the configuration of a student, which lists the layers that it keeps.

    Args:
        config: the teacher's configuration.
        layers: the teacher's layers to keep, ascending.
    """
    cut = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if name in _COUNTS_OF_FIRST and isinstance(value, int):
            setattr(cut, name, sum(layer < value for layer in layers))
        elif name in _INDICES and isinstance(value, list):
            kept = [index for index, layer in enumerate(layers) if layer in value]
            setattr(cut, name, kept)
        elif isinstance(value, list) and len(value) == config.num_hidden_layers:
            # One entry for each layer, such as the kind of its attention.
            setattr(cut, name, [value[layer] for layer in layers])
    cut.num_hidden_layers = len(layers)
    cut.post_dist_layers = list(layers)
    # The student's weights are written unquantized.
    if hasattr(cut, "quantization_config"):
        delattr(cut, "quantization_config")
    return cut


def check_same_layers(
    teacher: LanguageModel, student: LanguageModel, layers: tuple[int, ...]
) -> None:
    """Check that the layers of a student have the weights of the teacher's layers.

    Args:
        teacher: the teacher on the meta device.
        student: the student on the meta device.
        layers: the teacher's layers to keep.

    Raises:
        InputError: a layer is of another kind, such as one with experts in place of a dense one.
    """
    for index, layer in enumerate(layers):
        if _shapes(student.layers[index]) != _shapes(teacher.layers[layer]):
            raise InputError(
                f"student.layers: the place of a layer in a {type(teacher.model).__name__} decides "
                f"its kind, so layer {layer} cannot be layer {index} of a student",
                "list other layers in student.layers, which keep the order of the kinds",
            )


def _shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in layer.state_dict().items()}
