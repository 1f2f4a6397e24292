"""Compute the signals that a cache stores.

`signal_format.py` decides what is stored.

Shapes: B sequences, T tokens, N = B T positions, d width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from post_dist.config.schema import Distill, Student
from post_dist.data.seeded import seeded_generator
from post_dist.losses.signals import (
    TeacherSignal,
    project_teacher,
    sample_teacher,
    signal_of_tensors,
)
from post_dist.models.facts import facts_of
from post_dist.models.language_model import LanguageModel
from post_dist.runtime.gathering import gathered
from post_dist.stages.distill.online_teacher import OnlineTeacher
from post_dist.stages.distill.signal_format import (
    SAMPLES,
    exact_product,
    kept_bytes,
    kept_names,
)


class SignalMaker:
    """Runs the teacher and computes the tensors that `distill.cache` asks for.

    Args:
        teacher: the teacher, perhaps sharded.
        section: kind of signal, temperature and weights of the terms.
        student: what the student shares with the teacher.
        seed: seed of the samples.
    """

    def __init__(
        self, teacher: LanguageModel, section: Distill, student: Student, seed: int
    ) -> None:
        self.section = section
        self._dtype = teacher.model.dtype
        self._width = teacher.width
        self._is_compiled = teacher.is_compiled
        self._seed = seed
        self._lower_layers = section.layers_in_teacher(student)
        # A cached signal comes from the same code as a signal during training.
        self._online = OnlineTeacher(teacher, self._lower_layers)
        exact = exact_product(facts_of(teacher), fp32=self._dtype == torch.float32)
        self.names = kept_names(section, student, exact_product=exact)
        self._head = _WholeHead(teacher) if "entropy" in self.names else None

    @property
    def bytes_per_token(self) -> int:
        """Bytes that are stored for one token."""
        return kept_bytes(self.names, self._width, self._dtype.itemsize)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings that the signals depend on. The name of the cache folder depends on them."""
        # Only settings of this kind of signal count. Another student that needs the same signal can
        # then use the same folder.
        settings: dict[str, Any] = {"names": self.names, "dtype": str(self._dtype)}
        if "entropy" in self.names:
            settings["temperature"] = self.section.temperature
        if "samples" in self.names:
            settings["seed"] = self._seed
            settings["samples"] = SAMPLES
        # Compiled layers round otherwise, and a student should not depend on who made its signals.
        if self._is_compiled:
            settings["compiled"] = True
        if self._lower_layers:
            settings["lower_layers"] = self._lower_layers
        return settings

    @torch.no_grad()
    def make(
        self,
        numbers: Sequence[int],
        input_ids_BT: torch.Tensor,
        positions_BT: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """Compute the tensors to keep, each [B, T, ...] on the CPU. All ranks call it together.

        Args:
            numbers: the numbers of the B sequences in the corpus.
            input_ids_BT: their tokens.
            positions_BT: positions of the tokens where documents are kept apart, else None.
        """
        # Head and samples treat every position independently, so the batch axis is flattened.
        online = self._online.signals_of(numbers, input_ids_BT, positions_BT)
        flat = online.map(lambda tensor: tensor.flatten(0, 1))
        tensors = flat.tensors()
        if self._head is not None:
            tensors |= self._softened(flat.hidden, numbers, input_ids_BT.shape[1]).tensors()
        # Hidden states are always computed, and stored only if they are listed.
        kept = {}
        for name in self.names:
            kept[name] = tensors[name].unflatten(0, input_ids_BT.shape).cpu()
        if "samples" in kept:
            # int32 holds the tokens of any vocabulary in half the space.
            kept["samples"] = kept["samples"].int()
        return kept

    def _softened(
        self, hidden_Nd: torch.Tensor, numbers: Sequence[int], length: int
    ) -> TeacherSignal:
        """Compute the signal that replaces the teacher's softened distribution."""
        head = cast(_WholeHead, self._head)
        temperature = self.section.temperature
        if "product" in self.names:
            return project_teacher(hidden_Nd, head, temperature, head.weight_Vd)
        # A sequence's samples depend on its number alone, not on its batch.
        uniform = [self._uniform(number, length) for number in numbers]
        uniform_N = torch.cat(uniform).to(hidden_Nd.device)
        return sample_teacher(hidden_Nd, head, len(head.weight_Vd), temperature, uniform_N, SAMPLES)

    def _uniform(self, number: int, length: int) -> torch.Tensor:
        """Draw one uniform number for each token of the sequence with this number."""
        generator = seeded_generator(self._seed, number)
        return torch.rand(length, generator=generator)


class _WholeHead:
    """A whole copy of the teacher's head on this rank.

    Ranks may use it unequally often. A sharded head is gathered at each use, so ranks with more
    uses would wait forever for the others.
    """

    def __init__(self, teacher: LanguageModel) -> None:
        # `conflicts.py` refuses to cache samples of a head that is not one matrix.
        head = cast(nn.Linear, teacher.head_module)
        self._capped = teacher.capped
        self._bias_V: torch.Tensor | None = None
        with gathered(head), torch.no_grad():
            self.weight_Vd = head.weight.clone()
            if head.bias is not None:
                self._bias_V = head.bias.clone()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., V] of hidden states [..., d]."""
        return self._capped(functional.linear(hidden, self.weight_Vd, self._bias_V))


def read_signal(tensors: dict[str, torch.Tensor]) -> TeacherSignal:
    """Build the signal from the tensors of `SignalMaker.make`."""
    if "samples" in tensors:
        # torch needs indices in int64. The file holds int32.
        tensors = tensors | {"samples": tensors["samples"].long()}
    return signal_of_tensors(tensors)
