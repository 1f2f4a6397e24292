"""Compare all ways to use a prompt in one table, on one split and with the same metrics."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from post_dist.artifacts.evaluation_table import TABLE_FILE
from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.manifest import write_artifact
from post_dist.artifacts.prompt import SoftPromptArtifact
from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.schema import RunConfig
from post_dist.config.sources import Task
from post_dist.conflicts import Layout, raise_conflicts
from post_dist.data.split_reads import count_split_read
from post_dist.data.tasks import Examples, load_examples
from post_dist.errors import ArtifactRefused, InputError
from post_dist.files import digest_of
from post_dist.models.facts import read_facts
from post_dist.models.load import load_tokenizer
from post_dist.runtime.distributed import World
from post_dist.runtime.private_process import leave_no_core_dump, refuse_connections
from post_dist.runtime.shard_group import layout_of
from post_dist.stages.evaluate.cached_answers import EvaluationSplit, ModelFolders, load_answers
from post_dist.stages.evaluate.conflicts import PromptedModel, conflicts
from post_dist.stages.evaluate.private_text_baseline import plan_like, private_text_scores
from post_dist.stages.evaluate.rows import (
    DirectTransfer,
    RowInputs,
    StudentPrompt,
    TableEntry,
    table_entries,
)
from post_dist.stages.evaluate.text_baselines import text_baselines
from post_dist.stages.prompt_origin import check_belongs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptSet:
    """A prompt that was tuned on the student, and the prompts on the target that belong to it.

    Attributes:
        label: suffix of the names of its rows, such as `, epsilon 4`.
        source: the prompt on the student.
        on_target: the prompts on the target, by the name of their row.
    """

    label: str
    source: SoftPromptArtifact
    on_target: Mapping[str, SoftPromptArtifact]


@dataclass(frozen=True)
class _WordScores:
    """Class scores [N, C] of the classifiers without a language model.

    Attributes:
        without_privacy: by the name of the classifier.
        private: those of DP logistic regression, by the label of the prompt that it is beside.
    """

    without_privacy: Mapping[str, torch.Tensor]
    private: Mapping[str, torch.Tensor]


def check_evaluation(
    config: RunConfig, models: ModelFolders, prompts: Sequence[PromptSet], world: World
) -> None:
    """Refuse prompts of another student or task, and settings that do not suit the models.

    It reads the configurations and tokenizers of the models, and no weights. All ranks call it.

    Args:
        config: the run file.
        models: student and target.
        prompts: the prompts, each with its own rows.
        world: the ranks.

    Raises:
        ArtifactRefused: a prompt does not belong to the student, or to this task.
        InputError: there are conflicts; the message lists all of them.
    """
    student = read_facts(models.student)
    student_tokenizer = load_tokenizer(models.student)
    task = config.need_task("private_task")
    for prompt_set in prompts:
        for prompt in (prompt_set.source, *prompt_set.on_target.values()):
            _check_classes(prompt, task)
        check_belongs(prompt_set.source, student, student_tokenizer)

    # Examples must fit into the context behind the longest prompt of each model.
    source_lengths = [len(prompt_set.source.embeddings) for prompt_set in prompts]
    prompted = [PromptedModel("the student", student, max(source_lengths))]
    # A data owner loads no sharded model, so only the precision matters.
    layout = Layout(device=world.device.type)
    if models.target is not None:
        layout = layout_of(config.engine, world)
        target = read_facts(models.target)
        target_lengths = [0]
        # In the row of direct transfer, the target also reads the source prompts if they fit.
        if target.width == student.width:
            target_lengths += source_lengths
        for prompt_set in prompts:
            target_lengths += [len(prompt.embeddings) for prompt in prompt_set.on_target.values()]
        prompted.append(PromptedModel("the target", target, max(target_lengths)))
    raise_conflicts("evaluate", conflicts(config, prompted, layout))


def evaluate(
    folder: RunFolder,
    models: ModelFolders,
    prompts: Sequence[PromptSet],
    inputs: Mapping[str, str],
    world: World,
) -> None:
    """Compute all rows and write `table.json` to `folder.artifact`.

    `check_evaluation` comes first.

    Args:
        folder: the run folder.
        models: student and target.
        prompts: the prompts, each with its own rows.
        inputs: digests of `student` and `private_task`, and of `teacher` if there is a target.
        world: the ranks.

    Raises:
        InputError: the split is empty, or a file of the task cannot be read.
    """
    config = folder.config
    task = config.need_task("private_task")
    test_readings = _count_test_reading(folder, task, world)
    split = _load_split(folder, task, inputs["private_task"], world)
    # All tables of a run share one folder of answers, next to their own folders.
    student, target = load_answers(
        models, inputs, split, config, folder.path.parent / "answers", world
    )

    words = world.on_main(lambda: _word_scores(task, split.examples, prompts))

    # Compute the lines of each prompt in turn.
    rows: list[dict[str, Any]] = []
    parents = {name: digest for name, digest in inputs.items() if name != "private_task"}
    for prompt_set in prompts:
        row_inputs = RowInputs(
            config=config,
            label=prompt_set.label,
            student=student,
            target=target,
            source=prompt_set.source,
            on_target=prompt_set.on_target,
            text_baselines=words.without_privacy,
            private_text_scores=words.private.get(prompt_set.label),
        )
        entries = table_entries(row_inputs, first=not rows)
        rows += [_table_row(entry) for entry in entries]
        parents |= _parents(prompt_set, entries)

    # The table tells its readers how many evaluations have read the test split.
    table: dict[str, Any] = {"task": task.name, "split": config.evaluate.split}
    if test_readings:
        table["test_readings"] = test_readings
    table["rows"] = rows
    world.on_main(lambda: _write(folder, table, parents))


def _check_classes(prompt: SoftPromptArtifact, task: Task) -> None:
    """Check that the class biases or the head of a prompt belong to the classes of the run file.

    Raises:
        ArtifactRefused: the run file has other label words, or the same words in another order.
    """
    has_own_classes = bool(prompt.task.class_biases) or isinstance(prompt.adapter, LinearHead)
    if has_own_classes and prompt.task.label_words != tuple(task.labels.values()):
        raise ArtifactRefused(
            "the prompt has a bias or a head for each class of its own task, and "
            "private_task.labels has other label words, or another order",
            "evaluate it with the label words of its task.json, in that order",
        )


def _count_test_reading(folder: RunFolder, task: Task, world: World) -> int:
    """Record that this evaluation reads the test split.

    Returns:
        The number of evaluations that have read it, including this one; 0 for another split.
    """
    if folder.config.evaluate.split != "test":
        return 0
    # If settings are chosen by test results, these overestimate the quality on new data.
    runs = folder.path.parent
    readings = world.on_main(lambda: count_split_read(task, runs, folder.path.name))
    if readings > 1:
        log.warning(
            "%d evaluations have read the test split: choose settings with "
            "--set evaluate.split=validation",
            readings,
        )
    return readings


def _load_split(folder: RunFolder, task: Task, task_digest: str, world: World) -> EvaluationSplit:
    """Load the examples of the split."""
    split = folder.config.evaluate.split
    examples = world.on_main(lambda: load_examples(task, split, "private_task"))
    # The other ranks have got them from rank 0.
    leave_no_core_dump()
    if task.path is not None:
        refuse_connections()
    return EvaluationSplit(task, examples, digest_of({"rows": task_digest, "split": split}))


def _word_scores(task: Task, examples: Examples, prompts: Sequence[PromptSet]) -> _WordScores:
    """Classify the split without a language model.

    A task that generates text has no such rows, and neither has a file without training examples.
    """
    if task.response_column is not None:
        return _WordScores({}, {})
    try:
        training = load_examples(task, "train", "private_task")
    except InputError:
        return _WordScores({}, {})
    classes = len(task.labels)
    private = {}
    for prompt_set in prompts:
        statement = prompt_set.source.privacy
        if statement is None or statement["epsilon"] is None:
            continue
        plan = plan_like(statement)
        if plan is not None:
            scores_NC = private_text_scores(training, examples.texts, classes, plan)
            private[prompt_set.label] = scores_NC
    return _WordScores(text_baselines(training, examples.texts, classes), private)


def _table_row(entry: TableEntry) -> dict[str, Any]:
    """Return one line of the table: its name, its metrics and its epsilon."""
    metrics = entry.measured_by.metrics(entry.answers)
    return {"name": entry.name, **metrics, "epsilon": entry.epsilon}


def _parents(prompt_set: PromptSet, entries: Sequence[TableEntry]) -> dict[str, str]:
    """Return the digest of each prompt that the rows of a variant used, by the name of the row."""
    source = prompt_set.source.manifest.digest
    parents = {StudentPrompt.name + prompt_set.label: source}
    for name, prompt in prompt_set.on_target.items():
        parents[name + prompt_set.label] = prompt.manifest.digest
    # If the target could read the source prompt unchanged, it is also the parent of that row.
    direct = DirectTransfer.name + prompt_set.label
    if any(entry.name == direct for entry in entries):
        parents[direct] = source
    return parents


def _write(folder: RunFolder, table: Mapping[str, Any], parents: Mapping[str, str]) -> None:
    """Write the artifact with the table."""

    def fill(artifact: Path) -> None:
        (artifact / TABLE_FILE).write_text(json.dumps(table, indent=2) + "\n")

    settings = {"evaluate": folder.config.evaluate.model_dump(mode="json")}
    write_artifact(folder.artifact, "evaluation", fill, parents=parents, config=settings)
