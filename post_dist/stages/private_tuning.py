"""Private tuning of a prompt, once or as a search over settings. Nothing that is computed from a row is shown or kept without noise.

Shapes: N rows, B rows of a micro-batch.
"""

import logging
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from post_dist.artifacts.run_folder import RunFolder
from post_dist.data.tasks import load_examples
from post_dist.models.answers import answers
from post_dist.models.classifier import BIAS_SCALE
from post_dist.privacy.accounting import account, private_plan
from post_dist.privacy.gradients import SHARE_FROM_TOKENS, ExampleGradients
from post_dist.privacy.ledger import hold_ledger, ledger_path
from post_dist.privacy.randomness import destroy_key, open_source
from post_dist.privacy.search import Setting, run_search
from post_dist.privacy.statement import privacy_statement
from post_dist.privacy.training import PrivateRun, train_privately
from post_dist.runtime.distributed import World
from post_dist.stages.prompt_training import schedule_at
from post_dist.stages.tune import Material, prompt_optimizer

log = logging.getLogger(__name__)


def tune_privately(folder: RunFolder, material: Material, world: World, resume: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Tune with the plan of the run file.

    Args:
        folder: of the run; keeps the run's key and its state after every step.
        material: model, rows and start.
        world: this process.
        resume: auto or never.

    Returns:
        The tuned parameters, and what `privacy.json` says of them.

    Raises:
        PrivacyRefused: the accountants disagree, or the data set's budget does not allow the run.
    """
    config = folder.config
    plan = private_plan(config)
    cost = account(plan)
    if resume == "never":
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
        (folder.path / "randomness.json").unlink(missing_ok=True)
    source = open_source(folder.path / "randomness.json", plan.noise_source, config.seed)
    log.info(
        "tune: epsilon %.3f at delta %.2e, noise multiplier %.4f, %d steps", cost.epsilon, plan.delta, plan.noise_multiplier, plan.steps
    )
    if not plan.private:
        log.warning("tune: the noise comes from a seed: what this run makes is NOT private")
    with hold_ledger(ledger_path(config), source.run, plan, config.privacy.max_total_epsilon) as ledger:
        run = PrivateRun(plan, source, ledger, len(material.rows))

        def train(setting: Setting, trial: int, checkpoints_name: str) -> list[torch.Tensor]:
            parameters = material.parameters(config.tune)
            train_privately(
                parameters,
                lambda rows: micro_gradients(folder, material, parameters, rows, world),
                prompt_optimizer(config.tune, parameters, setting.learning_rate),
                lambda step: schedule_at(config.tune, step, plan.steps),
                setting.applied_to(run),
                folder.checkpoints / checkpoints_name if checkpoints_name else folder.checkpoints,
                trial=trial,
                label=folder.path.name if config.tune.search is None else None,
            )
            return parameters

        if config.tune.search is None:
            parameters = train(Setting(config.tune.learning_rate, plan.max_grad_norm), 0, "")
        else:
            parameters = run_search(config.tune, plan, source, folder.path, train, lambda tuned: _right(folder, material, tuned, world))
        destroy_key(folder.path / "randomness.json", source)
        ledger.finish()
        return parameters, privacy_statement(ledger.spending)


def micro_gradients(
    folder: RunFolder, material: Material, parameters: Sequence[torch.Tensor], rows: list[int], world: World
) -> Iterator[list[torch.Tensor]]:
    """Each example's gradients of one step's rows, in micro-batches of like length under the token budget.

    The sum over the step does not depend on how its rows are cut, so the cut may follow the rows' lengths.
    """
    section = folder.config.tune
    if not rows:
        return
    share = not material.model.masked and section.num_virtual_tokens >= SHARE_FROM_TOKENS
    gradients = ExampleGradients(material.model, material.verbalizer, parameters, share_prefix=share)
    for chosen in _micro_batches(rows, material, section.num_virtual_tokens, section.micro_batch_tokens):
        batch = material.template.collate([material.rows[row] for row in chosen]).to(world.device)
        yield gradients(batch, material.classes[chosen].to(world.device))


def _micro_batches(rows: list[int], material: Material, before: int, budget: int) -> Iterator[list[int]]:
    """Rows by falling length, cut so that the padded tokens of each part stay within the budget (one row always goes)."""
    ordered = sorted(rows, key=lambda row: (-len(material.rows[row].token_ids), row))
    while ordered:
        count = max(1, budget // (before + len(material.rows[ordered[0]].token_ids)))
        yield ordered[:count]
        ordered = ordered[count:]


def _right(folder: RunFolder, material: Material, parameters: Sequence[torch.Tensor], world: World) -> int:
    """How many validation rows the tuned parameters get right: private, for the search to add noise to."""
    task = folder.config.private_task
    examples = load_examples(task, "validation", "private_task")  # type: ignore[arg-type]
    rows = material.template.encode(examples.texts)
    common: dict[str, Any] = {"batch_size": folder.config.tune.batch_size, "world": world, "label": "trial"}
    scores_NC = answers(material.model, rows, material.template, parameters[0].detach(), material.verbalizer.scores, **common)
    if len(parameters) > 1:
        scores_NC = scores_NC + BIAS_SCALE * parameters[1].detach().cpu()
    return int((scores_NC.argmax(dim=1) == torch.tensor(examples.classes)).sum())
