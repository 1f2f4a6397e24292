"""The loop that trains soft prompts without privacy, for tuning and for transfer. It knows losses, and no data.

Shapes: n prompt tokens, d width.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.schema import PromptTraining
from post_dist.errors import InputError
from post_dist.runtime.checkpoint import optimizer_state, save_tensors, take_up
from post_dist.runtime.distributed import World
from post_dist.runtime.metric_log import MetricRecord
from post_dist.runtime.progress import progress
from post_dist.runtime.schedule import Schedule
from post_dist.runtime.stop import stop_requested, stopped

_MOST_SKIPPED_IN_A_ROW = 5
_SECONDS_BETWEEN_SAVES = 5.0
"""The state is small, but a shared disk is slow: it is kept each step, or each so many seconds if steps are faster."""

Losses = Callable[[int], Sequence[torch.Tensor]]
"""From the step's number to this rank's part of each prompt's loss, at the present values; the mean over ranks is the loss."""


@dataclass(frozen=True)
class PromptRun:
    """One prompt that is trained, in its own folder.

    Attributes:
        parameters: the prompt [n, d] in fp32, and what is tuned along with it; trained in place.
        optimizer: over the parameters.
        section: steps and schedule.
        folder: for checkpoints and metrics.
        open_metrics: opens the record of the losses; public or private, as the data are.
        show_loss: whether the loss may be shown; not when it comes from private data.
    """

    parameters: Sequence[torch.Tensor]
    optimizer: torch.optim.Optimizer
    section: PromptTraining
    folder: RunFolder
    open_metrics: Callable[[RunFolder, World], MetricRecord]
    show_loss: bool

    def take_up(self, resume: str, world: World) -> int:
        """Go back to where an earlier run left the prompt, if one did; the step to go on from."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        return take_up(self.parameters, self.optimizer, self.folder.checkpoints, resume, world)

    def save(self, step: int) -> None:
        """Keep what `take_up` goes back to."""
        save_tensors(
            self.folder.checkpoints, step, optimizer_state(self.parameters, self.optimizer)
        )

    @property
    def gradients(self) -> list[torch.Tensor]:
        """Of the parameters, after a backward pass."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]


def train_prompts(
    runs: Sequence[PromptRun], losses_at: Losses, first_step: int, world: World
) -> None:
    """Train prompts beside each other for a fixed number of steps; the last step's values are the result.

    They are kept in fp32 on every rank, outside ZeRO's shards; their gradients are averaged over the ranks by hand. A prompt's step
    whose mean gradient is not finite is passed over on every rank.

    Args:
        runs: with equally many steps, taken up at the same one.
        losses_at: each prompt's own loss; each rank sees its part of the step's rows.
        first_step: where to go on.
        world: the ranks that take part.

    Raises:
        InputError: five steps of a prompt in a row were passed over.
        Interrupted: a rank was asked to stop; the state is saved.
    """
    section = runs[0].section
    steps = section.steps
    schedule = Schedule(section.schedule, section.warmup_share, steps)
    rates = [[group["lr"] for group in run.optimizer.param_groups] for run in runs]
    in_a_row = [0] * len(runs)
    saved_at = -math.inf
    metrics = [run.open_metrics(run.folder, world) for run in runs]
    name = runs[0].folder.path.name + (f" and {len(runs) - 1} more" if len(runs) > 1 else "")
    with progress(name, steps, first_step, show=world.is_main) as advance:
        for step in range(first_step, steps):
            for run, own in zip(runs, rates, strict=True):
                for group, rate in zip(run.optimizer.param_groups, own, strict=True):
                    group["lr"] = rate * schedule.factor(step)
                run.optimizer.zero_grad()
            losses = torch.stack(list(losses_at(step)))
            losses.sum().backward()  # type: ignore[no-untyped-call]
            means = world.mean(losses.detach().clone()).tolist()
            for index, run in enumerate(runs):
                for gradient in run.gradients:
                    world.mean(gradient)
                # The mean is the same on every rank, and so is what they make of it.
                finite = all(bool(gradient.isfinite().all()) for gradient in run.gradients)
                in_a_row[index] = 0 if finite else in_a_row[index] + 1
                if finite:
                    run.optimizer.step()
                elif in_a_row[index] >= _MOST_SKIPPED_IN_A_ROW:
                    what = f"{in_a_row[index]} steps in a row had gradients that are not finite, up to step {step} of {run.folder.path.name}"
                    raise InputError(what, "lower the learning rate")
                metrics[index].write(step=step, loss=means[index], skipped=not finite)
            advance(
                f"loss {sum(means) / len(means):.4f}" if all(run.show_loss for run in runs) else ""
            )
            stop = stop_requested(world)
            if stop or world.any(
                step + 1 < steps and time.monotonic() - saved_at > _SECONDS_BETWEEN_SAVES
            ):
                for run in runs:
                    world.on_main(partial(run.save, step + 1))
                saved_at = time.monotonic()
            if stop:
                raise stopped(f"{name} is saved at step {step + 1} of {steps}")
