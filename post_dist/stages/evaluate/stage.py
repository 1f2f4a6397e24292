"""The comparison: every way to use the prompt, on one split, by one metric."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from post_dist.artifacts.manifest import write_artifact
from post_dist.artifacts.prompt import read_prompt
from post_dist.artifacts.run_folder import RunFolder
from post_dist.artifacts.task import PromptTask
from post_dist.config.sources import Task
from post_dist.data.split_reads import count_split_read
from post_dist.data.tasks import load_examples
from post_dist.errors import ArtifactRefused, InputError
from post_dist.files import digest_of
from post_dist.losses.transfer import proxy_logits
from post_dist.models.load import load_whole
from post_dist.models.sharded import load_sharded
from post_dist.runtime.distributed import World
from post_dist.runtime.precision import choose_precision
from post_dist.stages.evaluate.cached_answers import Questions, Scorer
from post_dist.stages.transfer.stage import check_belongs

log = logging.getLogger(__name__)

TABLE = "table.json"
_ON_STUDENT, _DIRECT = "student + prompt", "direct transfer"
ON_TARGET = ("published transfer", "transferred", "full prompt tuning")
"""Rows whose prompts were made for the target."""
_ORDER = (
    _ON_STUDENT,
    _DIRECT,
    "published transfer",
    "transferred",
    "proxy-tuning",
    "full prompt tuning",
)


@dataclass(frozen=True)
class Prompts:
    """A prompt that was tuned on the student, and what was made on the target from it or beside it.

    Attributes:
        label: what the names of its rows end with, such as an epsilon.
        source: the prompt on the student.
        on_target: by `ON_TARGET`.
    """

    label: str
    source: Path
    on_target: Mapping[str, Path]


def evaluate(
    folder: RunFolder,
    teacher_folder: Path | None,
    student_folder: Path,
    tuned: Sequence[Prompts],
    inputs: Mapping[str, str],
    world: World,
) -> None:
    """Score all rows and leave `table.json` in `folder.artifact`.

    Args:
        folder: the run's folder.
        teacher_folder: the target. A data owner has none, and gets the student's rows.
        student_folder: the student.
        tuned: each has rows of its own.
        inputs: digests of `student`, `private_task`, and of `teacher` if there is one.
        world: the ranks.

    Raises:
        ArtifactRefused: a prompt does not belong to these models or to this task.
    """
    config, section, task = folder.config, folder.config.evaluate, folder.config.private_task
    if task is None or task.template is None:
        raise InputError("evaluate needs the section `private_task`")
    read = [
        {_ON_STUDENT: read_prompt(each.source)}
        | {name: read_prompt(path) for name, path in each.on_target.items()}
        for each in tuned
    ]
    for prompts in read:
        for prompt in prompts.values():
            _check_classes(prompt.task, task)
    runs = folder.path.parent
    readings = (
        world.on_main(lambda: count_split_read(task, runs, folder.path.name))
        if section.split == "test"
        else 0
    )
    if readings > 1:
        log.warning(
            "the test split is read for the %d. time: choose settings with --set evaluate.split=validation",
            readings,
        )
    examples = world.on_main(lambda: load_examples(task, section.split, "private_task"))
    precision = choose_precision(config.engine, world.device)
    digest = digest_of(
        {"rows": inputs["private_task"], "split": section.split, "precision": precision}
    )
    common = Questions(task, examples, digest), runs / "answers", section.batch_size, world
    student = Scorer(
        load_whole(student_folder, precision, world.device),
        student_folder,
        inputs["student"],
        *common,
    )
    plain = student(None, "student")
    target = zero_shot = None
    if teacher_folder is None:
        first = {"name": "student", **student.measure(plain)}
    else:
        target = Scorer(
            load_sharded(teacher_folder, config.engine, precision, world),
            teacher_folder,
            inputs["teacher"],
            *common,
        )
        zero_shot = target(None, "zero-shot")
        first = {"name": "zero-shot", **target.measure(zero_shot)}
    parents = {name: digest for name, digest in inputs.items() if name != "private_task"}
    table = [first | {"epsilon": None}]
    for each, prompts in zip(tuned, read, strict=True):
        source = prompts[_ON_STUDENT]
        check_belongs(source, student.model, target.model if target else None, student.tokenizer)
        if target and target.takes(source):
            prompts[_DIRECT] = source
        by = {
            name: student if target is None or name == _ON_STUDENT else target for name in prompts
        }
        without = {name: by[name](prompt, name + each.label) for name, prompt in prompts.items()}
        biases = {
            name: torch.tensor(prompt.task.class_biases)
            for name, prompt in prompts.items()
            if prompt.task.class_biases
        }
        answered = without | {name: without[name] + bias for name, bias in biases.items()}
        if zero_shot is not None and task.response_column is None:
            answered["proxy-tuning"] = proxy_logits(
                plain, answered[_ON_STUDENT], zero_shot, config.transfer.proxy_lambda
            )
        for name in filter(answered.__contains__, _ORDER):
            scorer, epsilon = by.get(name, student), prompts.get(name, source).epsilon
            table.append(
                {"name": name + each.label, **scorer.measure(answered[name]), "epsilon": epsilon}
            )
            if name in biases and name != _DIRECT:
                table.append(
                    {
                        "name": f"{name}{each.label}, without biases",
                        **scorer.measure(without[name]),
                        "epsilon": epsilon,
                    }
                )
        parents |= {name + each.label: prompt.manifest.digest for name, prompt in prompts.items()}
    said = (
        {"task": task.name, "split": section.split}
        | ({"test_readings": readings} if readings else {})
        | {"rows": table}
    )

    def fill(artifact: Path) -> None:
        (artifact / TABLE).write_text(json.dumps(said, indent=2) + "\n")

    made_by = {"evaluate": section.model_dump(mode="json")}
    world.on_main(
        lambda: write_artifact(folder.artifact, "evaluation", fill, parents=parents, config=made_by)
    )


def _check_classes(of_prompt: PromptTask, task: Task) -> None:
    """Check that the biases of a prompt's classes are added to the scores of the same classes.

    Raises:
        ArtifactRefused: the run file has other label words, or the same in another order.
    """
    if of_prompt.class_biases and of_prompt.label_words != tuple(task.labels.values()):
        raise ArtifactRefused(
            "the prompt has a bias for each class of its own task, and private_task.labels has other label words, or another order",
            "evaluate it with the label words of its task.json, in that order",
        )
