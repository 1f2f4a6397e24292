"""Stage 2, run by the data owner: tune a soft prompt on the student with the private data.

Shapes: B examples of a batch, n prompt tokens, d width.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from post_dist.artifacts.card import write_card
from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.prompt import (
    PromptContents,
    Provenance,
    SoftPromptArtifact,
    write_prompt,
)
from post_dist.artifacts.run_folder import RunFolder
from post_dist.artifacts.task import PromptTask
from post_dist.config.schema import RunConfig
from post_dist.config.sources import Task
from post_dist.conflicts import Layout, raise_conflicts
from post_dist.data.order import rows_of_like_length, shuffled_rows
from post_dist.data.task_reader import TaskReader
from post_dist.data.tasks import load_examples
from post_dist.models.classifier import BIAS_SCALE, PromptInput
from post_dist.models.facts import read_facts
from post_dist.models.load import load_tokenizer, load_whole, tokenizer_fingerprint
from post_dist.models.prompt_init import prompt_from_text
from post_dist.models.tuning_task import TuningTask, example_losses
from post_dist.privacy.micro_batches import planned_sizes, size_of_longest
from post_dist.privacy.tuned_head import head_inputs, head_optimizer, head_parameters
from post_dist.runtime.distributed import World
from post_dist.runtime.optimizers import result_of
from post_dist.runtime.precision import choose_precision
from post_dist.runtime.private_metrics import open_private_metrics
from post_dist.runtime.private_process import offline
from post_dist.stages.prompt_origin import check_belongs
from post_dist.stages.prompt_training import PromptRun, StepLosses, train_prompts
from post_dist.stages.tune.conflicts import conflicts, start_conflicts

log = logging.getLogger(__name__)

_PRIVATE = (
    "A soft prompt that was tuned with differential privacy: epsilon {epsilon:.4g} at delta "
    "{delta:.2g}. The unit is {unit}, and two data sets are neighbors by the relation "
    "{neighbouring_relation}. What this covers, and what not, is below and in `privacy.json`."
)
_SEEDED = (
    "A soft prompt that is NOT private: it was tuned with noise from a seed, "
    "which can be subtracted."
)
_NOT_PRIVATE = (
    "A soft prompt. It was tuned WITHOUT differential privacy and may reveal its training data."
)


@dataclass(frozen=True)
class TunedModel:
    """The model that a prompt is tuned on.

    Attributes:
        folder: the student, or the target for the baseline of full prompt tuning.
        digest: digest of its files.
        name: its name in the adapter's configuration and on the model card.
        public_prompt: the public prompt that tuning starts from; None to start from text.
    """

    folder: Path
    digest: str
    name: str
    public_prompt: SoftPromptArtifact | None = None


def refuse_tuning(config: RunConfig, model: TunedModel, world: World) -> None:
    """Refuse a run file that does not suit the model. It reads no weights.

    Args:
        config: the run file.
        model: the student, or the target for the baseline of full prompt tuning.
        world: the ranks; only their device matters.

    Raises:
        ArtifactRefused: the public prompt does not belong to the model.
        InputError: there are conflicts; the message lists all of them.
    """
    facts = read_facts(model.folder)
    layout = Layout(device=world.device.type)
    if model.public_prompt is not None:
        check_belongs(model.public_prompt, facts, load_tokenizer(model.folder))
    found = conflicts(config, facts, layout) + start_conflicts(config, model.public_prompt)
    raise_conflicts("tune", found)


def tune(
    folder: RunFolder, private_task: Task, model: TunedModel, world: World, resume: str
) -> None:
    """Tune a prompt on a model and write it to `folder.artifact`. `refuse_tuning` comes first.

    Private data stay in one process, so only rank 0 tunes. Without `privacy.enabled` the prompt may
    reveal the private data.

    Args:
        folder: the run folder.
        private_task: the task and its examples.
        model: the model.
        world: the ranks.
        resume: `auto` resumes from the newest checkpoint; `never` deletes checkpoints first.

    Raises:
        InputError: the model and the data do not fit together.
        PrivacyRefused: the accountants disagree, or the budget of the data does not allow the run.
    """
    # A world of one rank: collective calls in the training loop must not wait for other ranks.
    alone = replace(world, size=1)

    def tune_alone() -> None:
        task = _load_task(private_task, folder.config, model, alone)
        with offline():
            parameters, statement = _train(folder, task, model.name, alone, resume)
        settings = _settings(folder.config, private_task)
        _write(folder, task, parameters, statement, settings, model)

    world.on_main(tune_alone)


def _load_task(
    private_task: Task, config: RunConfig, tuned: TunedModel, world: World
) -> TuningTask:
    """Load the training examples and the model."""
    section = config.tune
    # Load the data before the model, so that mistakes in a file are reported within a second.
    tokenizer = load_tokenizer(tuned.folder)
    loaded = load_examples(private_task, "train", "private_task")
    precision = choose_precision(config.engine, world.device)
    model = load_whole(tuned.folder, precision, world.device)
    # The reader binds the task to the model's tokenizer.
    prompt_task = PromptTask.of_section(private_task, section.init_text)
    reader = TaskReader(prompt_task, tokenizer, masked=model.masked)
    examples = reader.encode(loaded.texts, loaded.responses)
    targets = reader.responses(examples) if reader.generates else torch.tensor(loaded.classes)
    # The prompt starts from the public one, or from the embeddings of a text.
    head = None
    if tuned.public_prompt is not None:
        start_nd = tuned.public_prompt.embeddings.to(world.device)
        head = tuned.public_prompt.head if section.adapter == "head" else None
    else:
        start_nd = prompt_from_text(model, tokenizer, section.init_text, section.num_virtual_tokens)
    return TuningTask(model, reader, examples, targets, start_nd, loaded.users, head)


def _train(
    folder: RunFolder, task: TuningTask, model_name: str, world: World, resume: str
) -> tuple[list[torch.Tensor], dict[str, Any] | None]:
    """Tune the prompt, privately if the run file enables privacy.

    Returns:
        The tuned parameters, and the privacy statement; None for a run without privacy.
    """
    if folder.config.privacy.enabled:
        # Opacus takes seconds to import.
        from post_dist.privacy.private_run import tune_privately

        return tune_privately(folder, task, world, resume)
    num_virtual_tokens = folder.config.tune.num_virtual_tokens
    log.info("tune: %d prompt tokens on %s, without privacy", num_virtual_tokens, model_name)
    return _tune_without_privacy(folder, task, world, resume), None


def _tune_without_privacy(
    folder: RunFolder, task: TuningTask, world: World, resume: str
) -> list[torch.Tensor]:
    """Tune without privacy. The losses go to a file that only the owner can read."""
    section = folder.config.tune
    if task.head is None:
        parameters = task.parameters(section)
        losses_at = _losses_of_prompt(task, parameters, folder.config, world)
        optimizer = task.optimizer(section, parameters, section.learning_rate, section.steps)
    else:
        parameters = head_parameters(task.head)
        losses_at = _losses_of_head(task, task.head, parameters, folder.config, world)
        optimizer = head_optimizer(section, parameters, section.learning_rate, section.steps)
    run = PromptRun(
        parameters,
        optimizer,
        section,
        folder,
        open_metrics=open_private_metrics,
        show_loss=False,
    )
    first = run.take_up(resume, world)
    train_prompts([run], losses_at, first, world)
    return result_of(parameters, optimizer)


def _losses_of_prompt(
    task: TuningTask, parameters: Sequence[torch.Tensor], config: RunConfig, world: World
) -> StepLosses:
    """Return the loss of a step as a function of its number, with a prompt and its biases."""
    # Batches hold examples of similar length. Private batches are drawn at random instead.
    lengths = [len(example.token_ids) for example in task.examples]
    # A shared prompt needs one answer position for each example, but responses have many.
    shared = not task.reader.generates and task.model.shares_prompt
    prompt = PromptInput(prompt=parameters[0], shared=shared)
    bias = parameters[1] if len(parameters) > 1 else None

    def losses_at(step: int) -> list[torch.Tensor]:
        chosen = rows_of_like_length(step, config.tune.batch_size, lengths, config.seed)
        batch = task.reader.collate([task.examples[index] for index in chosen]).to(world.device)
        targets = task.targets[chosen].to(world.device)
        losses_B = example_losses(task.model, task.reader.verbalizer, batch, targets, prompt, bias)
        return [losses_B.mean()]

    return losses_at


def _losses_of_head(
    task: TuningTask,
    head: LinearHead,
    parameters: Sequence[torch.Tensor],
    config: RunConfig,
    world: World,
) -> StepLosses:
    """Return the loss of a step as a function of its number, with a head."""
    sizes = planned_sizes(task, size_of_longest(config.tune, task))
    inputs = head_inputs(task, head, sizes, world)
    features_Nd = torch.from_numpy(inputs.features_Nd).float()
    scores_NC = torch.from_numpy(inputs.scores_NC).float()
    weight, bias = parameters
    count = len(task.examples)
    size = min(config.tune.batch_size, count)

    def losses_at(step: int) -> list[torch.Tensor]:
        chosen = shuffled_rows(step * size, size, count, config.seed)
        scores_BC = scores_NC[chosen] + features_Nd[chosen] @ weight.T + bias
        return [functional.cross_entropy(scores_BC, task.targets[chosen])]

    return losses_at


def _write(
    folder: RunFolder,
    task: TuningTask,
    parameters: list[torch.Tensor],
    statement: dict[str, Any] | None,
    settings: dict[str, Any],
    model: TunedModel,
) -> None:
    """Write the artifact: the prompt, its task, its privacy statement and its model card."""

    def card(artifact: Path) -> None:
        _write_card(artifact, folder.config, statement, model.name)

    contents = _contents(task, parameters, statement)
    provenance = Provenance(
        model_name=model.name,
        tokenizer=tokenizer_fingerprint(task.reader.tokenizer),
        parents=_parents(model),
        config=settings,
    )
    write_prompt(folder.artifact, contents, provenance, card)


def _parents(model: TunedModel) -> dict[str, str]:
    """Return the digests of the model, and of the public prompt that tuning started from."""
    parents = {"model": model.digest}
    if model.public_prompt is not None:
        parents["public prompt"] = model.public_prompt.manifest.digest
    return parents


def _contents(
    task: TuningTask, parameters: Sequence[torch.Tensor], statement: dict[str, Any] | None
) -> PromptContents:
    """Return the tuned prompt, or the public prompt with the tuned head."""
    prompt_task = task.reader.task
    if task.head is not None:
        weight, bias = parameters
        head = task.head.with_values(weight, bias)
        return PromptContents(task.start_nd, prompt_task, statement, head)
    # The task carries the biases, in units of the class scores.
    if len(parameters) > 1:
        biases = tuple((BIAS_SCALE * parameters[1]).tolist())
        prompt_task = replace(prompt_task, class_biases=biases)
    return PromptContents(parameters[0], prompt_task, statement)


def _settings(config: RunConfig, private_task: Task) -> dict[str, Any]:
    """Return the settings for the artifact's manifest.

    They must not include the number of examples, which is private.
    """
    # The rule of the split is public. The number of examples in each split is private.
    rule = {"split_salt", "validation_share", "test_share", "test_hub_split"}
    split = {"hash": "sha256", **private_task.model_dump(include=rule)}
    settings: dict[str, Any] = {"tune": config.tune.model_dump(mode="json"), "split": split}
    # The paths of the ledger and its anchor stay with the owner.
    if config.privacy.enabled:
        places = {"ledger", "ledger_anchors"}
        settings["privacy"] = config.privacy.model_dump(mode="json", exclude=places)
    return settings


def _write_card(
    artifact: Path, config: RunConfig, statement: dict[str, Any] | None, model_name: str
) -> None:
    """Write the model card.

    The card of a private prompt includes the plan and the privacy statement.
    """
    # Settings first, then the statement: where both have the same key, the statement wins.
    rows = config.tune.model_dump(exclude_none=True)
    notes = {}
    if statement is None:
        summary = _NOT_PRIVATE
        rows["epsilon"] = "none: tuned without differential privacy"
    else:
        summary = _PRIVATE.format(**statement) if statement["private"] else _SEEDED
        hidden = {"enabled", "ledger", "ledger_anchors"}
        rows |= config.privacy.model_dump(exclude=hidden, exclude_none=True)
        claims = dict(statement)
        notes["What epsilon does not cover"] = claims.pop("not_covered")
        warnings = claims.pop("warnings")
        if warnings:
            notes["Warning"] = warnings
        rows |= claims
    write_card(
        artifact,
        f"Soft prompt for {model_name}",
        summary,
        rows,
        library="peft",
        tag="prompt-tuning",
        notes=notes,
    )
