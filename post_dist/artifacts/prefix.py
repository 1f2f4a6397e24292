"""A prefix: keys and values of virtual tokens, which each text attends to in every layer.

Shapes: L layers, n virtual tokens, h key heads, w width of a key and of a value, B examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class PrefixShape:
    """The keys and values that a model keeps of a token. They have the same shape in all layers.

    Attributes:
        layers: number L of layers.
        heads: number h of key heads, which is that of the value heads.
        width: width w of a key and of a value of one head.
    """

    layers: int
    heads: int
    width: int

    @property
    def text(self) -> str:
        """The three numbers in words."""
        return f"{self.heads} keys of width {self.width} for each token in {self.layers} layers"

    @property
    def token_width(self) -> int:
        """Number h w of values in the keys of one token and layer."""
        return self.heads * self.width


@dataclass(frozen=True)
class Prefix:
    """The keys and values of all layers (Li & Liang 2021).

    A prefix starts as the keys and values of a prompt, and then runs in place of that prompt. An
    artifact keeps the vectors of the prompt beside it. They say where the prefix started, and a
    transfer may start there too. No forward pass with the prefix reads them.

    Attributes:
        keys_and_values: for each layer its keys and then its values, from the lowest layer. Each is
            [h, n, w], or [B, h, n, w] with one prefix for each example.
        title: name of this kind of adapter in messages.
        place: where it stands to the prompt, in messages.
        in_peft: whether PEFT runs it.
    """

    title: ClassVar[str] = "prefix"
    place: ClassVar[str] = "in its place"
    in_peft: ClassVar[bool] = True

    keys_and_values: tuple[torch.Tensor, ...]

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """All values, by name."""
        return {str(place): part for place, part in enumerate(self.keys_and_values)}

    @property
    def num_virtual_tokens(self) -> int:
        """The number n of virtual tokens."""
        return self.keys_and_values[0].shape[-2]

    @property
    def shape(self) -> PrefixShape:
        """Layers, heads and width."""
        first = self.keys_and_values[0]
        return PrefixShape(len(self.keys_and_values) // 2, first.shape[-3], first.shape[-1])

    @property
    def values(self) -> tuple[torch.Tensor, ...]:
        """The keys and values, which tuning trains."""
        return self.keys_and_values

    def with_values(self, values: Sequence[torch.Tensor]) -> "Prefix":
        """Return the prefix with other keys and values, in their order."""
        return Prefix(tuple(values))

    def table(self) -> torch.Tensor:
        """Return one row [n, 2 L h w] for each virtual token, in the order of PEFT."""
        parts = torch.stack(self.keys_and_values)
        # From [2 L, h, n, w]: a row holds the layers, in each the heads, in each the width.
        by_token = parts.permute(2, 0, 1, 3)
        return by_token.reshape(self.num_virtual_tokens, -1)

    @classmethod
    def of_table(cls, table: torch.Tensor, shape: PrefixShape) -> "Prefix":
        """Make a prefix of the rows that `table` returns."""
        by_token = table.view(len(table), 2 * shape.layers, shape.heads, shape.width)
        parts = by_token.permute(1, 2, 0, 3).contiguous()
        return cls(tuple(parts.unbind()))
