"""The comparison: every way to use the prompt, on one split, by one metric.

Shapes: N rows, C classes.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from post_dist.artifacts.manifest import write_artefact
from post_dist.artifacts.prompt import SoftPromptArtefact, read_prompt
from post_dist.artifacts.run_folder import RunFolder
from post_dist.data.tasks import load_examples
from post_dist.data.template import Template, Verbalizer
from post_dist.errors import InputError
from post_dist.losses import proxy_logits
from post_dist.models.answers import answers
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.models.sharded import load_sharded
from post_dist.runtime.distributed import World, choose_precision
from post_dist.stages.transfer import check_belongs

log = logging.getLogger(__name__)

TABLE = "table.json"
_Z_95 = 1.959963984540054


def evaluate(
    folder: RunFolder,
    teacher_folder: Path,
    student_folder: Path,
    source_prompt_folder: Path,
    prompts: Mapping[str, Path],
    inputs: Mapping[str, str],
    world: World,
) -> None:
    """Score all rows and leave `table.json` in `folder.artifact`.

    Args:
        folder: the run's folder.
        teacher_folder: the target.
        student_folder: the student.
        source_prompt_folder: the prompt that was tuned on the student.
        prompts: for each further row its prompt: on the student where the row's name begins so, else on the target.
        inputs: digest of each of these.
        world: the ranks.
    """
    config, section, task = folder.config, folder.config.evaluate, folder.config.private_task
    if task is None or task.template is None:
        raise InputError("evaluate needs the section `private_task`")
    examples = load_examples(task, section.split, "private_task")
    classes = np.array(examples.classes)
    source_prompt = read_prompt(source_prompt_folder)
    others = {name: read_prompt(path) for name, path in prompts.items()}
    tokenizer = load_tokenizer(teacher_folder)
    precision = choose_precision(config.engine, world.device)
    student = load_whole(student_folder, precision, world.device)
    target = load_sharded(teacher_folder, folder.config.engine, precision, world)
    check_belongs(source_prompt, student, target, teacher_folder, student_folder)
    template = Template(task.template, tokenizer, task.max_length, masked=target.masked)
    verbalizer = Verbalizer(tuple(task.labels.values()), tokenizer, allow_multi_token=task.allow_multi_token)
    rows = template.encode(examples.texts)

    def scores(model: LanguageModel, prompt: SoftPromptArtefact | None, label: str) -> torch.Tensor:
        """Class scores [N, C], with the biases of the prompt's task."""
        prompt_nd = None if prompt is None else prompt.embeddings.to(world.device)
        plain_NC = answers(model, rows, template, prompt_nd, verbalizer.scores, batch_size=section.batch_size, world=world, label=label)
        return plain_NC if prompt is None or not prompt.task.class_biases else plain_NC + torch.tensor(prompt.task.class_biases)

    zero_shot_NC = scores(target, None, "zero-shot")
    student_NC = scores(student, None, "student")
    student_prompted_NC = scores(student, source_prompt, "student + prompt")
    epsilon = source_prompt.epsilon
    scored: dict[str, tuple[torch.Tensor, float | None]] = {
        "zero-shot": (zero_shot_NC, None),
        "student + prompt": (student_prompted_NC, epsilon),
        "direct transfer": (scores(target, source_prompt, "direct transfer"), epsilon),
        "proxy-tuning": (proxy_logits(student_NC, student_prompted_NC, zero_shot_NC, config.transfer.proxy_lambda), epsilon),
    }
    for name, prompt in others.items():
        scored[name] = (scores(student if name.startswith("student") else target, prompt, name), prompt.epsilon)
    for name, prompt in {"student + prompt": source_prompt, **others}.items():
        if prompt.task.class_biases:
            scored[f"{name}, without biases"] = (scored[name][0] - torch.tensor(prompt.task.class_biases), prompt.epsilon)
    table = {
        "task": task.name,
        "split": section.split,
        "rows": [{"name": name, **measure(values.numpy(), classes), "epsilon": cost} for name, (values, cost) in _in_order(scored)],
    }

    def fill(artifact: Path) -> None:
        (artifact / TABLE).write_text(json.dumps(table, indent=2) + "\n")

    settings = {"evaluate": section.model_dump(mode="json")}
    world.on_main(lambda: write_artefact(folder.artifact, "evaluation", fill, parents=inputs, config=settings))


def measure(scores_NC: np.ndarray, classes_N: np.ndarray) -> dict[str, Any]:
    """Micro and macro accuracy, Wilson's 95% interval of the micro one, and AUC (one class against the rest; None for rows of one class).

    AUC sees the ranking alone: beside it, accuracy shows how much a biased threshold costs.
    """
    right = scores_NC.argmax(axis=1) == classes_N
    present = np.unique(classes_N)
    areas = [roc_auc_score(classes_N == index, _margin(scores_NC, index)) for index in present] if len(present) > 1 else []
    return {
        "accuracy_micro": float(right.mean()),
        "accuracy_macro": float(balanced_accuracy_score(classes_N, scores_NC.argmax(axis=1))),
        "interval_95": wilson_interval(int(right.sum()), len(right)),
        "auc": float(np.mean(areas)) if areas else None,
        "n": len(right),
    }


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion."""
    share, z2 = right / total, _Z_95**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z_95 / (1 + z2 / total) * (share * (1 - share) / total + z2 / (4 * total**2)) ** 0.5
    return (middle - half, middle + half)


def _margin(scores_NC: np.ndarray, index: int) -> np.ndarray:
    """How far a class is ahead of the best other one."""
    others = np.delete(scores_NC, index, axis=1)
    margin: np.ndarray = scores_NC[:, index] - others.max(axis=1)
    return margin


_ORDER = (
    "zero-shot",
    "student + prompt",
    "student + prompt, without biases",
    "direct transfer",
    "published transfer",
    "transferred",
    "proxy-tuning",
    "full prompt tuning",
)


def _in_order(scored: dict[str, tuple[torch.Tensor, float | None]]) -> list[tuple[str, tuple[torch.Tensor, float | None]]]:
    """The rows of the run file's own settings in their order, then the others as they came."""
    first = {name: place for place, name in enumerate(_ORDER)}
    return sorted(scored.items(), key=lambda row: first.get(row[0], len(first)))
