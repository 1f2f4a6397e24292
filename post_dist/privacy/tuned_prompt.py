"""What private tuning trains: the protocol of its parts, and the prompt as such a part.

Shapes: B units.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from post_dist.config.schema import RunConfig
from post_dist.models.tuning_task import TuningTask
from post_dist.privacy.gradients import unit_gradients
from post_dist.privacy.scoring import count_right, validation_task
from post_dist.runtime.distributed import World


class TunedPart(Protocol):
    """What private tuning trains: the prompt itself, or a head behind it."""

    @property
    def units(self) -> Sequence[Sequence[int]]:
        """The examples of each unit of privacy."""

    def parameters(self) -> list[torch.Tensor]:
        """Return new fp32 parameters with their first values."""

    def optimizer(
        self, parameters: list[torch.Tensor], learning_rate: float, steps: int
    ) -> torch.optim.Optimizer:
        """Create the optimizer of the run file."""

    def gradients(
        self, parameters: Sequence[torch.Tensor], units: Sequence[int]
    ) -> Iterator[list[torch.Tensor]]:
        """Yield the gradients [B, ...] of each parameter for B of the units at a time."""

    def count_right(self, parameters: Sequence[torch.Tensor]) -> int:
        """Count the validation examples that the parameters classify correctly. It is private."""


@dataclass(frozen=True)
class TunedPrompt:
    """The prompt [n, d], and the bias parameters [C] if they are tuned.

    Attributes:
        task: the model, the training examples and the initial prompt.
        config: the run file.
        sizes: number of examples in a micro-batch of each padded length.
        world: this process, alone.
    """

    task: TuningTask
    config: RunConfig
    sizes: Mapping[int, int]
    world: World

    @property
    def units(self) -> Sequence[Sequence[int]]:
        """The examples of each unit of privacy."""
        return self.task.units

    def parameters(self) -> list[torch.Tensor]:
        """Return the initial prompt, and zero biases if they are tuned."""
        return self.task.parameters(self.config.tune)

    def optimizer(
        self, parameters: list[torch.Tensor], learning_rate: float, steps: int
    ) -> torch.optim.Optimizer:
        """Create the optimizer of the run file."""
        return self.task.optimizer(self.config.tune, parameters, learning_rate, steps)

    def gradients(
        self, parameters: Sequence[torch.Tensor], units: Sequence[int]
    ) -> Iterator[list[torch.Tensor]]:
        """Yield the gradients of a step's units, some of them at a time."""
        return unit_gradients(self.task, parameters, units, self.sizes, self.world.device)

    def count_right(self, parameters: Sequence[torch.Tensor]) -> int:
        """Count the validation examples that the prompt classifies correctly.

        Raises:
            InputError: the data have no validation examples.
            Interrupted: the run was asked to stop.
        """
        # Read the examples for each trial, so that they are in memory only while it is scored.
        validation = validation_task(self.task, self.config.need_task("private_task"))
        return count_right(validation, parameters, self.sizes, self.world)
