"""What tuning trains: the prompt itself, or a head behind a public prompt.

Shapes: B units or examples, C classes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch

from post_dist.config.schema import RunConfig, Tune
from post_dist.data.template import Batch
from post_dist.models.tuning_task import TuningTask
from post_dist.privacy.tuned_head import TunedHead
from post_dist.privacy.tuned_prompt import TunedPrompt
from post_dist.runtime.distributed import World


class TunedPart(Protocol):
    """What tuning trains.

    Args:
        task: the model, the training examples, and the prompt and head to start from.
        config: the run file.
        sizes: number of examples in a micro-batch of each padded length.
        world: this process, alone.
    """

    def __init__(
        self, task: TuningTask, config: RunConfig, sizes: Mapping[int, int], world: World
    ) -> None: ...

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
            task: the model, and the prompt and head to start from.
            section: says whether biases are tuned, and whether trials are scored.
        """

    def gradients(
        self, parameters: Sequence[torch.Tensor], units: Sequence[int]
    ) -> Iterator[list[torch.Tensor]]:
        """Yield the gradients [B, ...] of each parameter for B of the units at a time."""

    def count_right(self, parameters: Sequence[torch.Tensor]) -> int:
        """Count the validation examples that the parameters classify correctly. It is private."""

    def loss(self, parameters: Sequence[torch.Tensor], step: int) -> torch.Tensor:
        """Return the mean loss of a batch of tuning without privacy."""


def tuned_kind(task: TuningTask) -> type[TunedPart]:
    """Return the class of what the task tunes."""
    return TunedPrompt if task.head is None else TunedHead
