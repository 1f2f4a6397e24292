"""Learning-rate schedules. A rate is a function of the step, so checkpoints need no schedule."""

import math
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer

Shape = Literal["constant", "cosine", "linear"]


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up to the full learning rate, followed by a decay.

    Attributes:
        shape: `constant` keeps the rate. `cosine` and `linear` decay it, to zero after the last
            step.
        warmup_fraction: fraction of all steps over which the rate rises, 0 to 1.
        steps: number of steps of the run.
    """

    shape: Shape
    warmup_fraction: float
    steps: int

    def factor(self, step: int) -> float:
        """Return the fraction of the full learning rate at a step, counted from 0."""
        warmup = round(self.warmup_fraction * self.steps)
        if self.shape == "linear":
            # Without warm-up, the first step runs at the full rate.
            warmup = max(1, warmup)
            decay = (self.steps - step) / max(1, self.steps - warmup)
            return min((step + 1) / warmup, decay)
        if step < warmup:
            return (step + 1) / warmup
        if self.shape == "constant":
            return 1.0
        # Decay from 1 to 0 along half a period of the cosine.
        progress = (step - warmup) / max(1, self.steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * progress))


class ScheduledRates:
    """Sets the learning rate of every parameter group of an optimizer, step by step.

    Args:
        optimizer: the optimizer. Its groups must hold the full learning rates at this time.
        schedule: the fraction of the full learning rates at each step.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule) -> None:
        self._optimizer = optimizer
        self._schedule = schedule
        self._full_rates = [group["lr"] for group in optimizer.param_groups]

    def apply(self, step: int) -> None:
        """Set the learning rates of a step."""
        factor = self._schedule.factor(step)
        for group, full_rate in zip(self._optimizer.param_groups, self._full_rates, strict=True):
            group["lr"] = full_rate * factor
