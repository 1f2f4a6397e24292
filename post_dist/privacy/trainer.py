"""Private tuning of a prompt, once or as a search over settings. Nothing that is computed from a row is shown or kept without noise.

Shapes: B rows of a micro-batch, C classes.
"""

import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.schema import Tune
from post_dist.data.tasks import load_examples
from post_dist.data.template import Batch
from post_dist.models.classifier import BIAS_SCALE
from post_dist.models.tuning_task import TuningTask
from post_dist.privacy.accounting import account, private_plan
from post_dist.privacy.gradients import ExampleGradients, check_rows_are_alone, sharing_is_faster
from post_dist.privacy.ledger import LedgerRun, ledger_path, lock_ledger
from post_dist.privacy.randomness import destroy_key, open_source
from post_dist.privacy.search import Setting, run_search
from post_dist.privacy.statement import privacy_statement
from post_dist.privacy.training import PrivateRun, train_privately
from post_dist.runtime.distributed import World
from post_dist.runtime.schedule import Schedule
from post_dist.runtime.stop import stop_requested, stopped
from post_dist.runtime.watchdog import phase

log = logging.getLogger(__name__)

_LENGTH_STEP = 16


def tune_privately(
    folder: RunFolder, material: TuningTask, world: World, resume: str
) -> tuple[list[torch.Tensor], dict[str, Any]]:
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
    log.info(
        "tune: epsilon %.3f at delta %.2e, noise multiplier %.4f, %d steps",
        cost.epsilon,
        plan.delta,
        plan.noise_multiplier,
        plan.steps,
    )
    if not plan.private:
        log.warning("tune: the noise comes from a seed: what this run makes is NOT private")
    check_model(config.tune, material)
    learning_rate = config.privacy.learning_rate or config.tune.learning_rate
    key_file, ledger_file = folder.path / "randomness.json", ledger_path(config)
    with lock_ledger(ledger_file) as descriptor:
        if resume == "never":
            shutil.rmtree(folder.checkpoints, ignore_errors=True)
            key_file.unlink(missing_ok=True)
        source = open_source(key_file, plan.noise_source, config.seed)
        ledger = LedgerRun(
            ledger_file, descriptor, source.run, plan, config.privacy.max_total_epsilon
        )
        run = PrivateRun(plan, source, ledger, len(material.rows), world)

        schedule = Schedule(config.tune.schedule, config.tune.warmup_share, plan.steps)

        def train(setting: Setting, trial: int, checkpoints: Path) -> list[torch.Tensor]:
            parameters = material.parameters(config.tune)
            train_privately(
                parameters,
                lambda rows: micro_gradients(config.tune, material, parameters, rows, world.device),
                material.optimizer(config.tune, parameters, setting.learning_rate),
                schedule.factor,
                setting.applied_to(run),
                checkpoints,
                trial=trial,
                label=folder.path.name,
                show=config.tune.search is None,
            )
            return parameters

        if config.tune.search is None:
            parameters = train(Setting(learning_rate, plan.max_grad_norm), 0, folder.checkpoints)
        else:
            parameters = run_search(
                config.tune,
                learning_rate,
                plan,
                source,
                folder.checkpoints,
                train,
                lambda tuned: _right(folder, material, tuned, world),
            )
        destroy_key(key_file, source)
        ledger.finish()
        return parameters, privacy_statement(ledger.spending)


def check_model(section: Tune, material: TuningTask) -> None:
    """Refuse a model whose rows change each other's gradients, or whose context is too short.

    Raises:
        InputError: it is one.
    """
    parameters = material.parameters(section)
    gradients = _example_gradients(material, parameters)
    rows = max(
        2, section.micro_batch_size_per_gpu
    )  # also where 1 is given, short rows share a micro-batch
    if material.wanted.dim() == 1:
        wanted, length = (
            torch.arange(rows) % len(material.verbalizer.token_ids),
            min(_LENGTH_STEP, material.template.longest),
        )
    else:
        wanted, length = (
            torch.ones(rows, material.wanted.shape[1], dtype=torch.long),
            material.template.longest,
        )
    check_rows_are_alone(gradients, material.model, wanted, length)


def _example_gradients(
    material: TuningTask, parameters: Sequence[torch.Tensor]
) -> ExampleGradients:
    share = sharing_is_faster(material.model, len(parameters[0]))
    return ExampleGradients(material.model, material.verbalizer, parameters, share_prefix=share)


def micro_gradients(
    section: Tune,
    material: TuningTask,
    parameters: Sequence[torch.Tensor],
    rows: list[int],
    device: torch.device,
) -> Iterator[list[torch.Tensor]]:
    """Each example's gradients of one step's rows, in micro-batches of fixed shapes.

    What kernels round depends on the shapes that they are given. With a micro-batch's length and number of rows fixed by each
    row's own length, an example's gradient is a function of the example alone, bit for bit, whoever else is in the step; else one
    example more would move the others' gradients too, beyond the clipping norm.
    """
    if not rows:
        return
    gradients = _example_gradients(material, parameters)
    for counted, filled, batch in _micro_batches(rows, material, section.micro_batch_size_per_gpu):
        yield [
            part[:counted]
            for part in gradients(batch.to(device), material.wanted[filled].to(device))
        ]


def _padded_length(material: TuningTask) -> int:
    """Tokens of the longest micro-batch.

    A row of a masked model is never without padding: where all rows of a call are, transformers drops the mask, other kernels run, and
    what they round would depend on how long the rows beside are.
    """
    return material.template.longest + material.model.masked


def _micro_batches(
    rows: list[int], material: TuningTask, longest_rows: int
) -> Iterator[tuple[int, list[int], Batch]]:
    """The rows in micro-batches: how many rows of each count, those rows filled up with copies of the last, and the batch itself.

    Rows whose lengths round up to the same multiple of 16 come together, padded to it, and so many that all micro-batches have
    about as many tokens as `longest_rows` rows of the greatest length.
    """
    most = _padded_length(material)
    groups: dict[int, list[int]] = {}
    for row in rows:
        rounded = (
            -(-(len(material.rows[row].token_ids) + material.model.masked) // _LENGTH_STEP)
            * _LENGTH_STEP
        )
        groups.setdefault(min(rounded, most), []).append(row)
    for length, group in sorted(groups.items()):
        size = longest_rows * most // length
        for start in range(0, len(group), size):
            chosen = group[start : start + size]
            filled = chosen + chosen[-1:] * (size - len(chosen))
            yield (
                len(chosen),
                filled,
                material.template.collate([material.rows[row] for row in filled], length),
            )


def _right(
    folder: RunFolder, material: TuningTask, parameters: Sequence[torch.Tensor], world: World
) -> int:
    """How many validation rows the tuned parameters get right: private, for the search to add noise to."""
    examples = load_examples(folder.config.private_task, "validation", "private_task")  # type: ignore[arg-type]
    rows, wanted = material.template.encode(examples.texts), torch.tensor(examples.classes)
    return count_right(
        folder.config.tune, replace(material, rows=rows, wanted=wanted), parameters, world
    )


@torch.no_grad()
def count_right(
    section: Tune, material: TuningTask, parameters: Sequence[torch.Tensor], world: World
) -> int:
    """How many of the rows the parameters get right, in micro-batches of fixed shapes: one row more moves the count by one at most.

    Nothing is shown of it, for how many rows and trials there are is private.
    """
    right = 0
    for counted, filled, batch in _micro_batches(
        list(range(len(material.rows))), material, section.micro_batch_size_per_gpu
    ):
        phase("scoring a trial")
        rows = batch.to(world.device)
        scores_BC = material.verbalizer.scores(
            material.model(rows.input_ids, rows.attention_mask, parameters[0], rows.answer)
        )
        if len(parameters) > 1:
            scores_BC = scores_BC + BIAS_SCALE * parameters[1]
        right += int((scores_BC.argmax(dim=1).cpu() == material.wanted[filled])[:counted].sum())
        if stop_requested(world):
            raise stopped("a trial's score is begun again next time")
    return right
