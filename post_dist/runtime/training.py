"""The training loop of every stage. It takes steps, saves checkpoints and stops on request."""

import time
from typing import Protocol

from post_dist.runtime.distributed import World
from post_dist.runtime.progress import progress
from post_dist.runtime.stop import saving, stop_requested, stopped


class TrainingJob(Protocol):
    """A job that the loop trains.

    Attributes:
        label: name of the run in progress bars and messages.
        steps: number of steps in all.
    """

    label: str
    steps: int

    def take_step(self, step: int) -> str:
        """Take one optimizer step and return a short text for the progress bar.

        All ranks call it.
        """

    def save(self, step: int) -> None:
        """Save a checkpoint from which step number `step` is the next one. All ranks call it.

        A job may write it behind the next steps, and is then responsible for its completion.
        """


class CheckpointPolicy(Protocol):
    """A rule for when the loop saves a checkpoint."""

    def is_due(self, done: int, steps: int, world: World) -> bool:
        """Return whether to save after `done` of `steps` steps.

        All ranks call it together and get the same answer.
        """


class EverySteps:
    """Save after every `interval` steps and after the last one."""

    def __init__(self, interval: int) -> None:
        self._interval = interval

    def is_due(self, done: int, steps: int, world: World) -> bool:
        """Return whether to save after `done` of `steps` steps."""
        return done % self._interval == 0 or done == steps


class EverySeconds:
    """Save when a number of seconds has passed since the last save.

    After a fast step, saving to a shared disk could take longer than the step. There is no save
    after the last step, because the artifact follows it at once.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._saved_at = -float("inf")

    def is_due(self, done: int, steps: int, world: World) -> bool:
        """Return whether to save after `done` of `steps` steps."""
        # The clocks of the ranks differ, so they decide together.
        due = world.any(done < steps and time.monotonic() - self._saved_at > self._seconds)
        if due:
            self._saved_at = time.monotonic()
        return due


def run_training(
    job: TrainingJob, first_step: int, world: World, policy: CheckpointPolicy, *, show: bool = True
) -> None:
    """Train a job to its last step.

    Args:
        job: the job to train.
        first_step: the first step to take; above 0 after a resume.
        world: the ranks, which all call this function.
        policy: when to save a checkpoint.
        show: whether rank 0 shows progress. A private search hides it, because the number of its
            trials is private.

    Raises:
        Interrupted: a rank was asked to stop; the state is saved.
    """
    shown = progress(job.label, job.steps, first_step, show=show and world.is_main)
    with saving(), shown as advance:
        for step in range(first_step, job.steps):
            text = job.take_step(step)
            # This is a collective, so every rank calls it in every step.
            stop = stop_requested(world)
            if stop or policy.is_due(step + 1, job.steps, world):
                job.save(step + 1)
            advance(text)
            if stop:
                raise stopped(f"{job.label} is saved at step {step + 1} of {job.steps}")
