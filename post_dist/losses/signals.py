"""Teacher signals: the teacher's outputs that a distillation loss reads, one class for each kind.

A `HiddenSignal` needs the teacher's head to compute logits. A `ProjectedSignal` or `SampledSignal`
represents the teacher's softened distribution itself, so it needs no teacher head.

Shapes: N positions (or B sequences of T tokens), d width, V vocabulary, S samples.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Self

import torch

from post_dist.losses.heads import Head
from post_dist.losses.pieces import logit_pieces, split_positions


@dataclass(frozen=True, kw_only=True)
class TeacherSignal:
    """Base class of all signals. All its tensors have the same leading axes: [N] or [B, T].

    Attributes:
        below: output [..., d] of the frozen lower block that the student shares with the teacher.
            The student then starts from it and does not run these layers again.
    """

    below: torch.Tensor | None = None

    def __getitem__(self, positions: slice) -> Self:
        """Return the signal at some of the positions."""
        return self.map(lambda tensor: tensor[positions])

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Return the signal with `change` applied to each of its tensors."""
        changed = {name: change(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by field name, without None. `signal_of_tensors` is the inverse."""
        present = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                present[field.name] = tensor
        return present


@dataclass(frozen=True, kw_only=True)
class HiddenSignal(TeacherSignal):
    """The teacher's last hidden states, from which its head computes the logits.

    Attributes:
        hidden: last hidden states [..., d].
    """

    hidden: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class ProjectedSignal(TeacherSignal):
    """Product of the teacher's softened distribution with a head that both models share.

    The student's mean logit under the teacher's distribution is this product times the student's
    hidden state. The KL divergence and its gradient are therefore exact without teacher logits.

    Attributes:
        product: softmax(teacher / T) W [..., d], where W [V, d] is the weight of the shared head.
        entropy: entropy of softmax(teacher / T) in nats, [...].
        hidden: last hidden states [..., d], which only the cosine term needs; else None.
    """

    product: torch.Tensor
    entropy: torch.Tensor
    hidden: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SampledSignal(TeacherSignal):
    """Tokens drawn from the teacher's softened distribution. Loss and gradient are unbiased.

    Attributes:
        samples: tokens [..., S] of equal weight, drawn from softmax(teacher / T).
        entropy: entropy of softmax(teacher / T) in nats, [...].
    """

    samples: torch.Tensor
    entropy: torch.Tensor


def hidden_states(signal: TeacherSignal) -> torch.Tensor | None:
    """Return the teacher's last hidden states [..., d], or None if the signal lacks them."""
    if isinstance(signal, HiddenSignal | ProjectedSignal):
        return signal.hidden
    return None


def signal_of_tensors(tensors: Mapping[str, torch.Tensor]) -> TeacherSignal:
    """Build a signal from its tensors by field name, as `TeacherSignal.tensors` returns them."""
    # The fields tell the kind of signal. Hidden states may also come with a product.
    if "product" in tensors:
        return ProjectedSignal(**tensors)
    if "samples" in tensors:
        return SampledSignal(**tensors)
    return HiddenSignal(**tensors)


def project_teacher(
    hidden_Nd: torch.Tensor, head: Head, temperature: float, weight_Vd: torch.Tensor
) -> ProjectedSignal:
    """Compute the projected signal of hidden states, a few positions at a time.

    Args:
        hidden_Nd: the teacher's last hidden states.
        head: the teacher's head.
        temperature: T of the softened distribution.
        weight_Vd: weight of the head that the student and the teacher share.
    """
    products = []
    entropies = []
    for part in split_positions(len(hidden_Nd), logit_pieces(len(hidden_Nd), len(weight_Vd))):
        log_p = (head(hidden_Nd[part]).float() / temperature).log_softmax(dim=-1)
        p = log_p.exp()
        # In fp32: the student's part of the same product is subtracted from it later.
        products.append(p @ weight_Vd.float())
        entropies.append(-(p * log_p).sum(dim=-1))
    return ProjectedSignal(product=torch.cat(products), entropy=torch.cat(entropies))


def sample_teacher(
    hidden_Nd: torch.Tensor,
    head: Head,
    vocabulary: int,
    temperature: float,
    uniform_N: torch.Tensor,
    count: int,
) -> SampledSignal:
    """Draw tokens from the teacher's softened distribution, a few positions at a time.

    The draws are systematic: one uniform number places `count` points at equal distances on the
    cumulative distribution. A token of probability p is then drawn p * `count` times on average.
    The actual number differs from that by less than 1. Independent draws are also unbiased, but
    have a larger variance. Keeping only the most likely tokens is biased (arXiv 2503.16870).

    Args:
        hidden_Nd: the teacher's last hidden states.
        head: the teacher's head.
        vocabulary: number of logits V that the head computes at each position.
        temperature: T of the softened distribution.
        uniform_N: one uniform random number in [0, 1) for each position.
        count: number of tokens S to draw at each position.
    """
    samples = []
    entropies = []
    for part in split_positions(len(hidden_Nd), logit_pieces(len(hidden_Nd), vocabulary)):
        log_p = (head(hidden_Nd[part]).float() / temperature).log_softmax(dim=-1)
        # The inverse of the cumulative distribution turns uniform points into tokens.
        cumulative = log_p.exp().cumsum(dim=-1)
        # Scale the points by the last sum, which is not exactly 1 because of rounding.
        steps = uniform_N[part, None] + torch.arange(count, device=log_p.device)
        points = steps / count * cumulative[:, -1:]
        # The clamp is for a point that rounding puts past the last sum.
        drawn = torch.searchsorted(cumulative, points)
        samples.append(drawn.clamp_(max=log_p.shape[1] - 1))
        entropies.append(-(log_p.exp() * log_p).sum(dim=-1))
    return SampledSignal(samples=torch.cat(samples), entropy=torch.cat(entropies))
