"""What tuning trains: the prompt itself, or an adapter behind a prompt or in its place.

A new adapter is a class in its own file `tuned_*.py`, a line here in `_KINDS`, and its name and
settings in `config/stages.py`.

Shapes: B units or examples, C classes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from post_dist.artifacts.prompt import Adapter, PromptContents, SoftPromptArtifact
from post_dist.config.schema import RunConfig, Tune
from post_dist.config.stages import AdapterName
from post_dist.conflicts import Conflict
from post_dist.data.template import Batch
from post_dist.models.facts import ModelFacts
from post_dist.models.tuning_task import TuningTask
from post_dist.privacy.tuned_head import TunedHead
from post_dist.privacy.tuned_lora import TunedLora
from post_dist.privacy.tuned_prefix import TunedPrefix
from post_dist.privacy.tuned_prompt import TunedPrompt
from post_dist.runtime.distributed import World


class TunedPart(Protocol):
    """What tuning trains.

    Args:
        task: the model, the training examples, and the prompt and adapter to start from.
        config: the run file.
        sizes: number of examples in a micro-batch of each padded length.
        world: this process, alone.
    """

    def __init__(
        self, task: TuningTask, config: RunConfig, sizes: Mapping[int, int], world: World
    ) -> None: ...

    @staticmethod
    def start(
        task: TuningTask, config: RunConfig, public: SoftPromptArtifact | None
    ) -> Adapter | None:
        """Return the adapter that tuning starts from; None if the prompt itself is tuned.

        Args:
            task: the model and the prompt to start from, without examples and without an adapter.
            config: the run file.
            public: the public prompt; None to start from text.
        """

    @staticmethod
    def conflicts(section: Tune, model: ModelFacts) -> list[Conflict]:
        """Find what keeps it from being tuned on a model."""

    @staticmethod
    def start_conflicts(start: SoftPromptArtifact | None, model: ModelFacts) -> list[Conflict]:
        """Find what keeps it from starting at a public prompt, or from text."""

    @staticmethod
    def contents(
        task: TuningTask, parameters: Sequence[torch.Tensor], statement: dict[str, Any] | None
    ) -> PromptContents:
        """Return the tuned prompt, with its adapter.

        Args:
            task: what was tuned.
            parameters: the tuned values.
            statement: the privacy statement; None without privacy.
        """

    @property
    def units(self) -> Sequence[Sequence[int]]:
        """The examples of each unit of privacy."""

    def parameters(self) -> list[torch.Tensor]:
        """Return new fp32 parameters with their first values."""

    def optimizer(
        self, parameters: list[torch.Tensor], learning_rate: float, steps: int
    ) -> torch.optim.Optimizer:
        """Create the optimizer of the run file."""

    @staticmethod
    def results(
        task: TuningTask, section: Tune
    ) -> Callable[[Batch, torch.Tensor], list[torch.Tensor]]:
        """Return all that a private run computes of the examples [B] of a micro-batch.

        Args:
            task: the model, and the prompt and adapter to start from.
            section: says whether biases are tuned, and whether right answers are counted.
        """

    def gradients(
        self, parameters: Sequence[torch.Tensor], units: Sequence[int]
    ) -> Iterator[list[torch.Tensor]]:
        """Yield the gradients [B, ...] of each parameter for B of the units at a time."""

    def count_right(self, parameters: Sequence[torch.Tensor]) -> int:
        """Count the validation examples that the parameters classify correctly. It is private."""

    def loss(self, parameters: Sequence[torch.Tensor], step: int) -> torch.Tensor:
        """Return the mean loss of a batch of tuning without privacy."""


_KINDS: Mapping[AdapterName, type[TunedPart]] = {
    "prompt": TunedPrompt,
    "head": TunedHead,
    "lora": TunedLora,
    "prefix": TunedPrefix,
}


def tuned_kind(section: Tune) -> type[TunedPart]:
    """Return the class of what the run file tunes."""
    return _KINDS[section.adapter]
