"""A LoRA: for some linear layers of a model, a product of two thin matrices that is added to them.

Shapes: r rank, i inputs and o outputs of a linear layer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from post_dist.config.stages import LoraSettings

DOWN = ".lora_A.weight"
UP = ".lora_B.weight"
"""Ends of the names of the two factors of a linear layer, in the files of PEFT."""

Shapes = Mapping[str, tuple[int, int]]
"""Numbers of outputs and inputs of linear layers, by name."""


@dataclass(frozen=True)
class Lora:
    """The factors of all changed layers.

    Attributes:
        factors: the matrices [r, i] and [o, r] of each layer, by the layer's name in the model with
            `DOWN` or `UP` behind it.
        alpha: the product is scaled by alpha / r.
        title: name of this kind of adapter in messages.
        place: where it stands to the prompt, in messages.
        in_peft: whether PEFT runs it.
    """

    title: ClassVar[str] = "LoRA"
    place: ClassVar[str] = "behind it"
    in_peft: ClassVar[bool] = True

    factors: Mapping[str, torch.Tensor]
    alpha: float

    @classmethod
    def untrained(cls, shapes: Shapes, settings: LoraSettings, seed: int) -> "Lora":
        """Make a LoRA that changes nothing: the second factor of each layer is zero.

        The first one is drawn as in PEFT: uniformly, up to 1 / sqrt(i).

        Args:
            shapes: the layers to change.
            settings: rank and alpha.
            seed: seed of the first factors.
        """
        # Sorted names, so that a seed gives a layer the same values whatever order they come in.
        generator = torch.Generator().manual_seed(seed)
        factors = {}
        for name in sorted(shapes):
            outputs, inputs = shapes[name]
            uniform = 2 * torch.rand(settings.r, inputs, generator=generator) - 1
            factors[name + DOWN] = uniform / math.sqrt(inputs)
            factors[name + UP] = torch.zeros(outputs, settings.r)
        return cls(factors, settings.lora_alpha)

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """All values, by name."""
        return {**self.factors, "alpha": torch.tensor(float(self.alpha))}

    @property
    def layers(self) -> list[str]:
        """The names of the changed layers."""
        return [name.removesuffix(DOWN) for name in self.factors if name.endswith(DOWN)]

    @property
    def rank(self) -> int:
        """The rank r, which is the same in all layers."""
        # The factors may have one more dimension in front, with one LoRA for each example.
        return self.factors[self.layers[0] + DOWN].shape[-2]

    @property
    def scale(self) -> float:
        """The factor of the products."""
        return self.alpha / self.rank

    def pair(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the two factors of a layer."""
        return self.factors[layer + DOWN], self.factors[layer + UP]

    @property
    def values(self) -> tuple[torch.Tensor, ...]:
        """The factors, which tuning trains."""
        return tuple(self.factors.values())

    def with_values(self, values: Sequence[torch.Tensor]) -> "Lora":
        """Return the LoRA with other factors, in the order of `factors`."""
        return replace(self, factors=dict(zip(self.factors, values, strict=True)))

    def misfit(self, shapes: Shapes) -> str | None:
        """Return the first of its layers that a model lacks, or has in another shape.

        Args:
            shapes: the linear layers of the model.
        """
        # A LoRA of another model may have the same names, so shapes are compared too.
        for layer in self.layers:
            down, up = self.pair(layer)
            if shapes.get(layer) != (len(up), down.shape[1]):
                return layer
        return None
