"""The loop that trains a soft prompt without privacy, for tuning and for transfer. It knows a loss, and no data.

Shapes: n prompt tokens, d width.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.schema import PromptTraining
from post_dist.errors import InputError
from post_dist.runtime.checkpoint import optimizer_state, save_tensors, take_up
from post_dist.runtime.distributed import World
from post_dist.runtime.metrics import Metrics
from post_dist.runtime.progress import progress
from post_dist.runtime.stop import stop_requested, stopped

_MOST_SKIPPED_IN_A_ROW = 5
_SECONDS_BETWEEN_SAVES = 5.0
"""The state is small, but a shared disk is slow: it is kept each step, or each so many seconds if steps are faster."""

Loss = Callable[[int], torch.Tensor]
"""From the step's number to this rank's part of the loss, at the present values of the parameters; the mean over ranks is the loss."""


def train_prompt(
    parameters: Sequence[torch.Tensor],
    loss_at: Loss,
    optimizer: torch.optim.Optimizer,
    section: PromptTraining,
    folder: RunFolder,
    world: World,
    resume: str,
    *,
    metrics_name: str,
    show_loss: bool,
) -> None:
    """Train parameters in place for a fixed number of steps; the last step's values are the result.

    A step whose mean gradient is not finite is passed over on every rank.

    They are kept in fp32 on every rank, outside ZeRO's shards; their gradients are averaged over the ranks by hand.

    Args:
        parameters: the prompt [n, d], and what is tuned along with it.
        loss_at: the loss; each rank sees its part of the step's rows.
        optimizer: over the parameters.
        section: steps and schedule.
        folder: for checkpoints and metrics.
        world: the ranks that take part.
        resume: auto or never.
        metrics_name: the file for the losses.
        show_loss: whether the loss may be shown; not when it comes from private data.

    Raises:
        InputError: five steps in a row were passed over.
        Interrupted: a rank was asked to stop; the state is saved.
    """
    for parameter in parameters:
        parameter.requires_grad_(True)
    rates = [group["lr"] for group in optimizer.param_groups]
    first_step = take_up(parameters, optimizer, folder.checkpoints, resume, world)
    in_a_row = 0
    saved_at = -math.inf
    metrics = Metrics(folder.path / metrics_name if world.is_main else None)
    with progress(folder.path.name, section.steps, first_step, show=world.is_main) as advance:
        for step in range(first_step, section.steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule_at(section, step, section.steps)
            optimizer.zero_grad()
            loss = loss_at(step)
            loss.backward()  # type: ignore[no-untyped-call]
            for parameter in parameters:
                world.mean(parameter.grad)  # type: ignore[arg-type]
            # The mean is the same on every rank, and so is what they make of it.
            finite = all(bool(parameter.grad.isfinite().all()) for parameter in parameters)  # type: ignore[union-attr]
            in_a_row = 0 if finite else in_a_row + 1
            if finite:
                optimizer.step()
            elif in_a_row >= _MOST_SKIPPED_IN_A_ROW:
                raise InputError(
                    f"{in_a_row} steps in a row had gradients that are not finite, up to step {step}", "lower the learning rate"
                )
            mean_loss = float(world.mean(loss.detach().clone()))
            metrics.write(step=step, loss=mean_loss, skipped=not finite)
            advance(f"loss {mean_loss:.4f}" if show_loss else "")
            stop = stop_requested(world)
            if stop or world.any(step + 1 < section.steps and time.monotonic() - saved_at > _SECONDS_BETWEEN_SAVES):
                world.on_main(partial(save_tensors, folder.checkpoints, step + 1, optimizer_state(parameters, optimizer)))
                saved_at = time.monotonic()
            if stop:
                raise stopped(f"{folder.path.name} is saved at step {step + 1} of {section.steps}")


def schedule_at(section: PromptTraining, step: int, steps: int) -> float:
    """The share of the learning rate at a step: linear warm-up, then constant or half a cosine; a function of the step alone."""
    rise = round(section.warmup_share * steps)
    if step < rise:
        return (step + 1) / rise
    if section.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
