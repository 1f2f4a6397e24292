"""Let torch compile the layers of a model, which fuses their small operations."""

from functools import cache

import torch

from post_dist.errors import EnvironmentFault, first_line
from post_dist.models.language_model import LanguageModel
from post_dist.models.lower_block import SkippedLayer


def compile_layers(model: LanguageModel) -> None:
    """Compile the layers of a whole model, each by itself, at their first forward pass.

    Layers of one class share their code, so a model takes as long to compile as one layer. Compiled
    code does not see hooks on the modules inside a layer, so the model no longer runs with
    `answer`, whose selection of positions is such a hook, nor with a LoRA.

    Raises:
        EnvironmentFault: torch cannot compile on this machine.
    """
    _check_compiler(model.model.device.type)
    # Otherwise the number of a layer is a constant of its code, and each layer has code of its own.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    for layer in model.layers:
        if not isinstance(layer, SkippedLayer):
            layer.forward = torch.compile(layer.forward)
    model.is_compiled = True


@cache
def _check_compiler(device_type: str) -> None:
    """Compile one operation, because a missing compiler would be found only in the first step."""
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device_type))
    except Exception as error:
        # The backends raise errors of many classes.
        raise EnvironmentFault(
            f"distill.compile: torch cannot compile for this {device_type}: {first_line(error)}",
            "install a C++ compiler, and Triton for a GPU, or leave distill.compile out",
        ) from error
