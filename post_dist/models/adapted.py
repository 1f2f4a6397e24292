"""Run a model with an adapter behind its prompt, or in its place.

Shapes: B examples, T tokens, r rank, i inputs and o outputs of a linear layer, h key heads,
n virtual tokens, w width of a key and of a value.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from post_dist.artifacts.lora import Lora
from post_dist.artifacts.prefix import Prefix
from post_dist.artifacts.prompt import Adapter
from post_dist.errors import InputError
from post_dist.models.language_model import LanguageModel


@contextmanager
def adapted(model: LanguageModel, adapter: Adapter | None) -> Iterator[None]:
    """Run a model with an adapter inside this context.

    A head changes no layer: its scores are added behind the model. A prefix stands in place of any
    prompt that the model is given.

    Args:
        model: the model, frozen and whole.
        adapter: the adapter; None changes nothing. The values of a LoRA or a prefix may have one
            more dimension in front, with one adapter for each example of a batch.

    Raises:
        InputError: the examples of a batch are not apart in a layer, and each has its own LoRA.
    """
    with ExitStack() as hooks:
        if isinstance(adapter, Lora):
            # A hook on each changed layer adds its product, and goes when the context ends.
            for layer in adapter.layers:
                module = model.model.get_submodule(layer)
                down, up = (factor.to(model.model.device) for factor in adapter.pair(layer))
                addition = _Addition(down, up, adapter.scale)
                hooks.callback(module.register_forward_hook(addition).remove)
        if isinstance(adapter, Prefix):
            hooks.enter_context(model.behind(_rows(model, adapter)))
        yield


def _rows(model: LanguageModel, prefix: Prefix) -> list[torch.Tensor]:
    """Return keys and values [1, h, n, w], or [B, h, n, w], in the type of the model's own."""
    rows = []
    for part in prefix.keys_and_values:
        of_model = part.to(model.model.device, model.model.dtype)
        rows.append(of_model if part.dim() == 4 else of_model[None])
    return rows


class _Addition:
    """Adds a LoRA's product to the output of a linear layer.

    Args:
        down: the first factor [r, i] or [B, r, i].
        up: the second factor [o, r] or [B, o, r].
        scale: the factor of the product.
    """

    def __init__(self, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
        self._down = down
        self._up = up
        self._scale = scale

    def __call__(
        self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor:
        """Return the output [B, T, o] of the layer with the product."""
        given = inputs[0].to(self._down.dtype)
        # A batched product would pair other rows than those of an example with its factors.
        if self._down.dim() == 3 and given.shape[:-2] != self._down.shape[:1]:
            raise InputError(
                f"a {type(module).__name__} of this model reads the tokens of all examples as one",
                "choose other layers in tune.lora.target_modules",
            )
        # The thin products first: the product of the factors would be as large as the weight.
        product = (given @ self._down.mT) @ self._up.mT
        return output + (self._scale * product).to(output.dtype)
