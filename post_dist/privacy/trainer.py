"""Private training: a state machine that can be killed at any point.

    draw units -> clipped sum -> intent on disk -> noise and step -> state on disk -> next step

After a kill, the step whose state is not on disk is repeated. It draws the same units: examples, or
users. If their sum is the same, the ledger already has the intent, and the noise is the same. The
outcome is then the same and costs nothing. If the sum differs (another machine, other kernels), the
noise is independent, and the ledger charges the step again.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from post_dist.config.schema import RunConfig
from post_dist.privacy.ledger import LedgerRun
from post_dist.privacy.mechanism import PrivateOptimizer
from post_dist.privacy.plan import PrivacyPlan
from post_dist.privacy.randomness import RandomSource
from post_dist.privacy.tuned_part import TunedPart
from post_dist.runtime.checkpoint import load_tensors, optimizer_state, restore_newest, save_tensors
from post_dist.runtime.distributed import World
from post_dist.runtime.optimizers import result_of
from post_dist.runtime.schedule import Schedule, ScheduledRates
from post_dist.runtime.training import EverySteps, run_training

_CLIPPING_NORM = "clipping_norm"


@dataclass(frozen=True)
class TrialSettings:
    """The settings that a search varies. None of them changes the privacy cost of a trial."""

    learning_rate: float
    max_grad_norm: float


@dataclass(frozen=True)
class PrivateRun:
    """Objects that all trials of one private run share.

    Attributes:
        plan: the privacy plan. It defines the sampler, clipping, noise and divisor.
        source: all randomness of the run.
        ledger: records the intent of each step.
        checkpoints: folder for the state after every step.
        label: name of the run in progress bars and messages.
        world: this process, alone.
    """

    plan: PrivacyPlan
    source: RandomSource
    ledger: LedgerRun
    checkpoints: Path
    label: str
    world: World


class PrivateTrainer:
    """Trains and scores a part of a tuning task under a privacy plan.

    Args:
        part: what is trained: the prompt, or an adapter behind it or in its place.
        config: the run file.
        run: plan, randomness, ledger and checkpoints.
    """

    def __init__(self, part: TunedPart, config: RunConfig, run: PrivateRun) -> None:
        self.part = part
        self.config = config
        self.run = run

    def train(self, settings: TrialSettings, trial: int, checkpoints: Path) -> list[torch.Tensor]:
        """Train from the start, or from the last checkpoint, for all steps of the plan.

        Args:
            settings: learning rate and clipping norm.
            trial: number of the trial in a search; 0 without a search.
            checkpoints: folder for the trial's state.

        Returns:
            The tuned parameters, in the order of the part's `parameters`.

        Raises:
            PrivacyRefused: the ledger does not allow a step.
            Interrupted: the run was asked to stop; the state is saved.
        """
        job = PrivateTrial(self, settings, trial, checkpoints)
        # Steps before the checkpoint are charged before the first new step is taken.
        first_step = job.resume()
        # A search shows no progress, because the number of its trials is private.
        show = self.config.tune.search is None
        # Every step is saved: a repeated step is free only while its sum can be computed again.
        run_training(job, first_step, self.run.world, EverySteps(1), show=show)
        return job.result


class PrivateTrial:
    """One training run under the plan, as a job of the training loop.

    A run without a search is trial 0.

    Args:
        trainer: gives the task, the run file and the private run.
        settings: learning rate and clipping norm of this trial.
        trial: number of the trial.
        checkpoints: folder for its state.

    Attributes:
        label: name of the run in progress bars and messages.
        steps: number of steps of the plan.
        parameters: the parameters of the part, trained in place.
    """

    def __init__(
        self, trainer: PrivateTrainer, settings: TrialSettings, trial: int, checkpoints: Path
    ) -> None:
        # A trial may have its own clipping norm. The noise scales with it, so the cost is the same.
        section = trainer.config.tune
        plan = replace(trainer.run.plan, max_grad_norm=settings.max_grad_norm)
        self._trainer = trainer
        self._run = trainer.run
        self._trial = trial
        self._checkpoints = checkpoints
        self._sampler = plan.sampler
        self.label = trainer.run.label
        self.steps = plan.steps
        # Each trial starts with new parameters. `resume` replaces their values after a kill.
        self.parameters = trainer.part.parameters()
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self._optimizer = trainer.part.optimizer(
            self.parameters, settings.learning_rate, plan.steps
        )
        # The inner optimizer holds the state to save. The private one clips and adds noise.
        self._private = PrivateOptimizer(self._optimizer, plan, self._run.source, trial)
        self._adapts = plan.clip_quantile is not None
        # The schedule is a function of the step alone, so no learning rate depends on the data.
        schedule = Schedule(section.schedule, section.warmup_share, plan.steps)
        self._rates = ScheduledRates(self._private, schedule)

    @property
    def result(self) -> list[torch.Tensor]:
        """The values that the training ends with."""
        return result_of(self.parameters, self._optimizer)

    def resume(self) -> int:
        """Load the last checkpoint, if there is one, and charge the steps before it.

        Returns:
            The step to start from.
        """
        world = self._run.world
        done = restore_newest(self.parameters, self._optimizer, self._checkpoints, "auto", world)
        # An adapted clipping norm is part of the state.
        if done and self._adapts:
            saved = load_tensors(self._checkpoints, done)
            self._private.max_grad_norm = float(saved[_CLIPPING_NORM])
        # If the ledger is a copy older than the checkpoint, it lacks these steps.
        self._run.ledger.charge_done(self._trial, done)
        return done

    def take_step(self, step: int) -> str:
        """Take one private step. The returned text is empty, because the loss is private."""
        self._rates.apply(step)
        # The name (trial, step) draws the same examples again after a kill.
        total = len(self._trainer.part.units)
        units = self._sampler.draw(self._run.source, total, self._trial, step)
        # Sums are exact, so the split into micro-batches does not change them.
        for gradients in self._trainer.part.gradients(self.parameters, units):
            self._private.accumulate(gradients)
        # A step without examples gets noise like any other step.
        self._private.finish(step, partial(self._run.ledger.intend, self._trial, step))
        return ""

    def save(self, step: int) -> None:
        """Save the state before step `step`."""
        state = optimizer_state(self.parameters, self._optimizer)
        if self._adapts:
            norm = torch.tensor(self._private.max_grad_norm, dtype=torch.float64)
            state[_CLIPPING_NORM] = norm
        save_tensors(self._checkpoints, step, state)
