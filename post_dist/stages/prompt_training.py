"""Train soft prompts without privacy, for `tune` and `transfer`.

This module sees losses, and never the data that they come from.

Shapes: n prompt tokens, d width.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.schema import PromptTraining
from post_dist.errors import InputError
from post_dist.runtime.checkpoint import optimizer_state, restore_newest, save_tensors
from post_dist.runtime.distributed import World
from post_dist.runtime.metric_log import MetricRecord
from post_dist.runtime.nonfinite import NonFiniteGuard
from post_dist.runtime.schedule import Schedule, ScheduledRates
from post_dist.runtime.training import EverySeconds, run_training

_SECONDS_BETWEEN_CHECKPOINTS = 5.0
"""Least time between saves. Writing a small file to a shared disk may take longer than a step."""

StepLosses = Callable[[int], Sequence[torch.Tensor]]
"""Function from the number of a step to one loss for each prompt, at the prompts' current values.

Each rank computes its part of a step. The mean of a loss over ranks is the loss of the step.
"""


@dataclass(frozen=True)
class PromptRun:
    """The training of one prompt.

    Attributes:
        parameters: the prompt [n, d] and any other tuned tensors, in fp32. They are trained in
            place.
        optimizer: the optimizer over the parameters.
        section: number of steps, and schedule of the learning rate.
        folder: folder for checkpoints and metrics.
        open_metrics: opens the record of the losses. It must be the private one for private data.
        show_loss: whether the loss may appear in progress bars; False if it comes from private
            data.
    """

    parameters: Sequence[torch.Tensor]
    optimizer: torch.optim.Optimizer
    section: PromptTraining
    folder: RunFolder
    open_metrics: Callable[[RunFolder, World], MetricRecord]
    show_loss: bool

    def restore_newest(self, resume: str, world: World) -> int:
        """Restore the newest checkpoint if one exists.

        Args:
            resume: `auto`, or `never` to delete earlier checkpoints.
            world: the ranks, which all call this method.

        Returns:
            The step from which training resumes; 0 without a checkpoint.
        """
        # The parameters were plain tensors until now. Training needs their gradients.
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        return restore_newest(
            self.parameters, self.optimizer, self.folder.checkpoints, resume, world
        )

    def save(self, step: int) -> None:
        """Save a checkpoint from which step number `step` is the next one."""
        state = optimizer_state(self.parameters, self.optimizer)
        save_tensors(self.folder.checkpoints, step, state)

    @property
    def gradients(self) -> list[torch.Tensor]:
        """Gradients of the parameters, after a backward pass."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]


def train_prompts(
    runs: Sequence[PromptRun], losses_at: StepLosses, first_step: int, world: World
) -> list[InputError | None]:
    """Train prompts together for a fixed number of steps.

    The values after the last step are the result. A prompt that diverges does not stop the others.

    Args:
        runs: the prompts; all have the same number of steps and resume at the same step.
        losses_at: computes this rank's part of each prompt's loss.
        first_step: step from which training resumes.
        world: the ranks that take part.

    Returns:
        For each prompt the error that says how it diverged; None if it did not.

    Raises:
        Interrupted: a rank was asked to stop; the state is saved.
    """
    # The trainer takes the steps. The loop shows progress, saves checkpoints and handles stops.
    trainer = PromptTrainer(runs, losses_at, world)
    # Once no prompt is left, there is nothing to train. Each has its own error.
    with suppress(_AllDiverged):
        run_training(trainer, first_step, world, EverySeconds(_SECONDS_BETWEEN_CHECKPOINTS))
    return trainer.failures


def train_prompt(
    run: PromptRun, loss_at: Callable[[int], torch.Tensor], first_step: int, world: World
) -> None:
    """Train one prompt, as `train_prompts` does several.

    Args:
        run: the prompt.
        loss_at: computes this rank's part of the loss of a step.
        first_step: step from which training resumes.
        world: the ranks that take part.

    Raises:
        InputError: five steps in a row were not finite.
        Interrupted: a rank was asked to stop; the state is saved.
    """
    (failure,) = train_prompts([run], lambda step: [loss_at(step)], first_step, world)
    if failure is not None:
        raise failure


class _AllDiverged(Exception):
    """No prompt is left to train."""


class PromptTrainer:
    """Trains one or several prompts together, as a `TrainingJob`.

    Every rank holds whole prompts in fp32, outside ZeRO's shards. This class averages their
    gradients over the ranks.

    Args:
        runs: the prompts.
        losses_at: computes this rank's part of each prompt's loss.
        world: the ranks.

    Attributes:
        label: name of the run in progress bars and messages.
        steps: number of steps in all.
    """

    def __init__(self, runs: Sequence[PromptRun], losses_at: StepLosses, world: World) -> None:
        self.label = runs[0].folder.path.name
        if len(runs) > 1:
            self.label += f" and {len(runs) - 1} more"
        self.steps = runs[0].section.steps
        self._prompts = [_TrainedPrompt(run, world) for run in runs]
        self._losses_at = losses_at
        self._world = world
        self._show_loss = all(run.show_loss for run in runs)

    @property
    def failures(self) -> list[InputError | None]:
        """For each prompt the error that says how it diverged; None if it did not."""
        return [prompt.failure for prompt in self._prompts]

    def take_step(self, step: int) -> str:
        """Take one optimizer step of each prompt.

        Args:
            step: number of the step, from 0.

        Returns:
            The mean loss, for the progress bar; empty if the loss is private.

        Raises:
            _AllDiverged: the last prompt that had not diverged has done so.
        """
        for prompt in self._prompts:
            prompt.begin_step(step)

        # The losses share no parameter, so one backward pass serves all prompts.
        losses = torch.stack(list(self._losses_at(step)))
        losses.sum().backward()
        # `World.mean` averages in place, so the metrics get a copy.
        means = self._world.mean(losses.detach().clone())
        finite = torch.stack([prompt.average_gradients() for prompt in self._prompts])
        # All values are read at once, because each read waits for the GPU.
        mean_losses, are_finite = torch.stack([means, finite.to(means.dtype)]).tolist()

        # One prompt may skip its step while the others take theirs.
        for prompt, loss, is_finite in zip(self._prompts, mean_losses, are_finite, strict=True):
            prompt.finish_step(step, loss, finite=bool(is_finite))
        if None not in self.failures:
            raise _AllDiverged
        if not self._show_loss:
            return ""
        return f"loss {sum(mean_losses) / len(mean_losses):.4f}"

    def save(self, step: int) -> None:
        """Save a checkpoint of each prompt from which step number `step` is the next one."""
        # Rank 0 saves for all, since every rank holds the same values.
        for prompt in self._prompts:
            self._world.on_main(partial(prompt.run.save, step))


class _TrainedPrompt:
    """One prompt of a `PromptTrainer`, with its learning rates, metrics and skipped steps.

    Attributes:
        run: the prompt.
        failure: the error that says how it diverged; None if it did not.
    """

    def __init__(self, run: PromptRun, world: World) -> None:
        self.run = run
        self.failure: InputError | None = None
        self._world = world
        schedule = Schedule(run.section.schedule, run.section.warmup_share, run.section.steps)
        self._rates = ScheduledRates(run.optimizer, schedule)
        self._guard = NonFiniteGuard(run.folder.path.name)
        self._metrics = run.open_metrics(run.folder, world)

    def begin_step(self, step: int) -> None:
        """Set the learning rates of a step, and clear the last gradients."""
        self._rates.apply(step)
        self.run.optimizer.zero_grad()

    def average_gradients(self) -> torch.Tensor:
        """Average the gradients over ranks, and return whether all are finite, as a scalar."""
        finite = []
        for gradient in self.run.gradients:
            self._world.mean(gradient)
            finite.append(gradient.isfinite().all())
        # All ranks hold the same mean, so they make the same decision.
        return torch.stack(finite).all()

    def finish_step(self, step: int, loss: float, *, finite: bool) -> None:
        """Take the step if the gradients are finite.

        Args:
            step: number of the step.
            loss: loss of the step, averaged over ranks.
            finite: whether the averaged gradients are finite.
        """
        if finite:
            self.run.optimizer.step()
        try:
            self._guard.record(step, finite=finite)
        except InputError as error:
            self.failure = error
        self._metrics.write(step=step, loss=loss, skipped=not finite)
