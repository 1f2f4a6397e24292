"""Run private tuning from the plan to the statement, as a single training run or as a search.

Values computed from private examples get noise before they are shown or saved. The one exception
is the ledger, which holds keyed commitments and stays with the owner.
"""

import logging
import math
import shutil
from dataclasses import replace
from typing import Any

import torch

from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.schema import RunConfig
from post_dist.models.tuning_task import TuningTask
from post_dist.privacy.accounting import account
from post_dist.privacy.batch_sizes import independent_sizes
from post_dist.privacy.calibration import private_plan
from post_dist.privacy.comparison import Comparison
from post_dist.privacy.ledger import LedgerRun, claim_anchor_for, lock_ledger
from post_dist.privacy.plan import PrivacyPlan
from post_dist.privacy.randomness import destroy_key, open_source
from post_dist.privacy.search import run_search
from post_dist.privacy.spending import DataSpending
from post_dist.privacy.statement import privacy_statement
from post_dist.privacy.trainer import PrivateRun, PrivateTrainer, TrialSettings
from post_dist.privacy.tuned_part import tuned_kind
from post_dist.runtime.distributed import World

log = logging.getLogger(__name__)

_SCORE_NOISE = 0.4
"""Largest standard deviation of a class score by the noise of a head, in nats. Chosen on reviews,
with 500, 1,500 and 6,800 examples at epsilon 8 and 1."""


def check_private_tuning(config: RunConfig) -> None:
    """Refuse a run before it has a folder: its plan, or the ledger of its data.

    Raises:
        InputError: no plan follows from the run file, or the ledger cannot be written to.
        PrivacyRefused: the accountants disagree, or another run holds the ledger.
        ArtifactRefused: the ledger was changed.
    """
    account(private_plan(config))
    with lock_ledger(claim_anchor_for(config)):
        pass


def tune_privately(
    folder: RunFolder, task: TuningTask, world: World, resume: str
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Tune a prompt under the privacy plan of the run file.

    Args:
        folder: holds the run's key, and its state after every step.
        task: the model, the examples and the initial prompt.
        world: this process, alone.
        resume: `auto` or `never`.

    Returns:
        The tuned parameters, and the contents of `privacy.json`.

    Raises:
        InputError: the model cannot be tuned privately.
        PrivacyRefused: the accountants disagree, or the budget of the data does not allow the run.
    """
    config = folder.config
    # The plan and the model are checked before the ledger is opened.
    plan = private_plan(config)
    _log_cost(plan)
    sizes = independent_sizes(config.tune, task)
    key_file = folder.path / "randomness.json"
    anchor = claim_anchor_for(config)
    # The lock is held for the whole run: two runs must not spend one budget at the same time.
    with lock_ledger(anchor) as open_ledger:
        if resume == "never":
            shutil.rmtree(folder.checkpoints, ignore_errors=True)
            key_file.unlink(missing_ok=True)
        # An unfinished run resumes with its key, and so with its name in the ledger.
        source = open_source(key_file, plan.noise_source, config.seed)
        begun = _resumed(plan, config.privacy.target_epsilon, open_ledger.spending, source.run)
        if begun != plan:
            _log_cost(begun)
            plan = begun
        ledger = LedgerRun(open_ledger, source.run, plan, config.privacy.max_total_epsilon)
        run = PrivateRun(plan, source, ledger, folder.checkpoints, folder.path.name, world)
        # A search varies these settings; a single run uses them as they are.
        trainer = PrivateTrainer(tuned_kind(config.tune)(task, config, sizes, world), config, run)
        settings = TrialSettings(learning_rate(config, plan), plan.max_grad_norm)
        # A head's rate follows from the plan, so the run file does not show it.
        if config.tune.adapter == "head":
            log.info("tune: learning rate %.3g", settings.learning_rate)
        if config.tune.search is None:
            parameters = _single_run(trainer, settings)
        else:
            parameters = run_search(trainer, settings)
        # Without the key, a finished run cannot be resumed, and its noise cannot be subtracted.
        destroy_key(key_file, source)
        ledger.finish()
        return parameters, privacy_statement(ledger.spending)


def _resumed(
    plan: PrivacyPlan, target: float | None, spending: DataSpending, run: str
) -> PrivacyPlan:
    """Return the plan of a run that may have begun under a version that calibrates otherwise.

    Args:
        plan: the plan that this version gives the run.
        target: the epsilon that its noise was calibrated for; None for a given noise.
        spending: what the runs of the ledger have spent.
        run: name of the run.

    Returns:
        The plan with which the run began, if that differs in its noise alone and meets the target.
    """
    begun = spending.runs.get(run)
    if begun is None or target is None or begun.plan == plan:
        return plan
    same = replace(begun.plan, noise_multiplier=plan.noise_multiplier) == plan
    return begun.plan if same and account(begun.plan).epsilon <= target else plan


def _single_run(trainer: PrivateTrainer, settings: TrialSettings) -> list[torch.Tensor]:
    """Train once, and compare the result with its start if the plan pays for that."""
    run = trainer.run
    if run.plan.score_noise_multiplier is None:
        return trainer.train(settings, 0, run.checkpoints)
    # Missing validation examples must show before the training.
    comparison = Comparison(trainer)
    parameters = trainer.train(settings, 0, run.checkpoints)
    comparison.finish(parameters)
    return parameters


def learning_rate(config: RunConfig, plan: PrivacyPlan) -> float:
    """Return the learning rate: that of the run file, or less for a head if the noise is large."""
    if config.privacy.learning_rate is not None:
        return config.privacy.learning_rate
    rate = config.tune.learning_rate
    if config.tune.adapter == "head":
        # The noise of all steps adds up to a random walk, and the features of a head have length 1.
        noise_of_step = plan.noise_multiplier * plan.max_grad_norm / plan.expected_batch_size
        rate = min(rate, _SCORE_NOISE / (noise_of_step * math.sqrt(plan.steps)))
    return rate


def _log_cost(plan: PrivacyPlan) -> None:
    """Log the cost of the plan, and warn if it is not private."""
    cost = account(plan)
    log.info(
        "tune: epsilon %.3f at delta %.2e, noise multiplier %.4f, %d steps",
        cost.epsilon,
        plan.delta,
        plan.noise_multiplier,
        plan.steps,
    )
    for warning in plan.warnings():
        log.warning("tune: %s", warning)
    if not plan.private:
        log.warning("tune: the noise comes from a seed, so the result of this run is NOT private")
