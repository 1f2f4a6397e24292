"""A linear head: class scores from a model's hidden states, behind a soft prompt.

Shapes: B examples, C classes, m features: the hidden states of one or more layers, one behind
another.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier on standardized hidden states. Its scores are added to the label words'.

    All tensors are in fp64, so that a step is the same on every machine.

    Attributes:
        mean: mean [m] of the hidden states of public text.
        scale: their standard deviation [m].
        weight: one vector [C, m] for each class.
        bias: one number [C] for each class.
        above: number of layers of the model that lie above those which the head reads.
        title: name of this kind of adapter in messages.
        place: where it stands to the prompt, in messages.
        in_peft: whether PEFT runs it.
    """

    title: ClassVar[str] = "linear head"
    place: ClassVar[str] = "behind it"
    in_peft: ClassVar[bool] = False

    mean: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    above: int = 0

    @classmethod
    def untrained(cls, hidden_Nm: torch.Tensor, num_classes: int, above: int = 0) -> "LinearHead":
        """Make a head whose scores are zero.

        Args:
            hidden_Nm: hidden states of public text, which give mean and scale.
            num_classes: number of classes C.
            above: number of layers above those of the hidden states.
        """
        hidden = hidden_Nm.double()
        # A coordinate that never changes says nothing, whatever it is divided by.
        scale = hidden.std(dim=0).clamp_min(torch.finfo(torch.float32).eps)
        weight = hidden.new_zeros(num_classes, hidden.shape[1])
        return cls(hidden.mean(dim=0), scale, weight, hidden.new_zeros(num_classes), above)

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """All values, by name. A head of the last layers does not name its place."""
        found = dict(vars(self))
        above = found.pop("above")
        return found | {"above": self.mean.new_tensor([above])} if above else found

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "LinearHead":
        """Make a head of the values that `tensors` returns."""
        values = {name: tensor.double() for name, tensor in tensors.items()}
        above = values.pop("above", torch.zeros(1))
        return cls(**values, above=int(above.item()))

    @property
    def trained(self) -> bool:
        """Whether the head adds anything to the scores."""
        return bool(self.weight.any() or self.bias.any())

    def depth(self, width: int) -> int:
        """Return the number of layers that the head reads, one above the other.

        Args:
            width: width of the model's hidden states, of which m is a multiple.
        """
        return len(self.mean) // width

    def layers(self, width: int, count: int) -> list[int]:
        """Return the layers of a model that its class scores need, counted from 0.

        These are the layers that the head reads, and the last one, which the label words need.

        Args:
            width: width of the model's hidden states.
            count: number of the model's layers.
        """
        end = count - self.above
        # Private tuning also tries a copy of the model that has fewer layers than the head reads.
        own = list(range(max(0, end - self.depth(width)), end))
        return [*own, count - 1] if self.above else own

    def with_values(self, weight: torch.Tensor, bias: torch.Tensor) -> "LinearHead":
        """Return the head with trained values."""
        return replace(self, weight=weight.detach().double(), bias=bias.detach().double())

    def read(self, hidden_Bk: torch.Tensor) -> torch.Tensor:
        """Return the part [B, m] that the head reads of the hidden states of `layers`."""
        return hidden_Bk[..., : len(self.mean)]

    def features(self, hidden_Bm: torch.Tensor) -> torch.Tensor:
        """Standardize hidden states, and scale each row to length 1.

        Args:
            hidden_Bm: hidden states, or those of one example [m].

        Returns:
            Features of the same shape, in fp64.
        """
        device = hidden_Bm.device
        standard = (hidden_Bm.double() - self.mean.to(device)) / self.scale.to(device)
        lengths = standard.norm(dim=-1, keepdim=True)
        return standard / lengths.clamp_min(torch.finfo(torch.float64).tiny)

    def scores(self, hidden_Bm: torch.Tensor) -> torch.Tensor:
        """Return what the head adds to the class scores [B, C], in fp32."""
        device = hidden_Bm.device
        features_Bm = self.features(hidden_Bm)
        scores_BC = features_Bm @ self.weight.to(device).T + self.bias.to(device)
        return scores_BC.float()
