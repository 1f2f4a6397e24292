"""The private training loop: a state machine that may be killed anywhere.

    draw rows -> clipped sum -> intent on disk -> noise and step -> state on disk -> next

After a kill the step whose state is not on disk is done again. The same rows are drawn; for the same sum the ledger has the
intent already and the same noise is drawn, so the outcome is the same and costs nothing; for another sum (another machine,
other kernels) the noise is independent and the ledger charges the step again.

Shapes: B examples, ... a parameter's own shape.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from post_dist.privacy.ledger import LedgerRun
from post_dist.privacy.mechanism import PrivateOptimizer
from post_dist.privacy.plan import PrivacyPlan
from post_dist.privacy.randomness import RandomSource
from post_dist.privacy.sampling import poisson_rows
from post_dist.runtime.checkpoint import optimizer_state, save_tensors, take_up
from post_dist.runtime.distributed import World
from post_dist.runtime.progress import progress
from post_dist.runtime.stop import stop_requested, stopped

MicroGradients = Callable[[list[int]], Iterator[Sequence[torch.Tensor]]]
"""From the rows of a step to the gradients of each of its micro-batches: for each parameter [B, ...]."""


@dataclass(frozen=True)
class PrivateRun:
    """What a private run trains with.

    Attributes:
        plan: the privacy plan; the sampler, the clip, the noise and the divisor are its.
        source: of all randomness.
        ledger: where each step's intent is put.
        total: number of private rows.
        world: this process, alone.
    """

    plan: PrivacyPlan
    source: RandomSource
    ledger: LedgerRun
    total: int
    world: World


def train_privately(
    parameters: Sequence[torch.Tensor],
    gradients_of: MicroGradients,
    optimizer: torch.optim.Optimizer,
    rate_at: Callable[[int], float],
    run: PrivateRun,
    checkpoints: Path,
    *,
    trial: int = 0,
    label: str,
    show: bool = True,
) -> None:
    """Train parameters in place for all of the plan's steps.

    Args:
        parameters: fp32 leaves.
        gradients_of: each example's own gradient.
        optimizer: over the parameters.
        rate_at: learning rate over the optimizer's own at a step; a function of the step alone.
        run: plan, randomness and ledger.
        checkpoints: where the state is kept after every step.
        trial: which trial of a search this is.
        label: what the progress is called.
        show: whether it is shown; how many trials there are is not.
    """
    for parameter in parameters:
        parameter.requires_grad_(True)
    private = PrivateOptimizer(optimizer, run.plan, run.source, trial)
    rates = [group["lr"] for group in private.param_groups]
    first = take_up(parameters, optimizer, checkpoints, "auto", run.world)
    run.ledger.charge_done(trial, first)
    with progress(label, run.plan.steps, first, show=show) as advance:
        for step in range(first, run.plan.steps):
            for group, rate in zip(private.param_groups, rates, strict=True):
                group["lr"] = rate * rate_at(step)
            for gradients in gradients_of(
                poisson_rows(run.plan, run.source, run.total, trial, step)
            ):
                private.accumulate(gradients)
            private.finish(step, partial(run.ledger.intend, trial, step))
            save_tensors(checkpoints, step + 1, optimizer_state(parameters, optimizer))
            advance("")
            if stop_requested(run.world):
                raise stopped(f"the state is saved at step {step + 1} of {run.plan.steps}")
