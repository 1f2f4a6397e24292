"""The comparison: every way to use the prompt, on one split, by one metric.

Shapes: N rows, C classes.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from post_dist.artifacts.manifest import digest_of, write_artefact, write_folder, writing
from post_dist.artifacts.prompt import SoftPromptArtefact, read_prompt
from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.sources import Task
from post_dist.data.readings import count_reading
from post_dist.data.tasks import load_examples
from post_dist.data.template import Template, Verbalizer
from post_dist.errors import InputError
from post_dist.losses import proxy_logits
from post_dist.models.answers import answers
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer, load_whole, tokenizer_fingerprint
from post_dist.models.sharded import load_sharded
from post_dist.runtime.distributed import World, choose_precision
from post_dist.stages.transfer import check_belongs

log = logging.getLogger(__name__)

TABLE = "table.json"
_SCORES = "scores.safetensors"
_ON_STUDENT = "student + prompt"
ON_TARGET = ("published transfer", "transferred", "full prompt tuning")
"""Rows whose prompts were made for the target."""
_ORDER = (_ON_STUDENT, "direct transfer", "published transfer", "transferred", "proxy-tuning", "full prompt tuning")
_Z_95 = 1.959963984540054


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
    folder: RunFolder, teacher_folder: Path, student_folder: Path, tuned: Sequence[Prompts], inputs: Mapping[str, str], world: World
) -> None:
    """Score all rows and leave `table.json` in `folder.artifact`.

    Args:
        folder: the run's folder.
        teacher_folder: the target.
        student_folder: the student.
        tuned: each has rows of its own.
        inputs: digests of `teacher`, `student` and `private_task`.
        world: the ranks.
    """
    config, section, task = folder.config, folder.config.evaluate, folder.config.private_task
    if task is None or task.template is None:
        raise InputError("evaluate needs the section `private_task`")
    runs = folder.path.parent
    counted: list[int] = []
    if section.split == "test":
        world.on_main(lambda: counted.append(count_reading(task, runs, folder.path.name)))
    readings = world.from_main(sum(counted))
    if readings > 1:
        log.warning("the test split is read for the %d. time: choose settings with --set evaluate.split=validation", readings)
    examples = load_examples(task, section.split, "private_task")
    precision = choose_precision(config.engine, world.device)
    texts = _Texts(task, examples.texts, digest_of({"rows": inputs["private_task"], "split": section.split, "precision": precision}))
    student = _Scorer(load_whole(student_folder, precision, world.device), student_folder, inputs["student"], texts, folder, world)
    target = _Scorer(load_sharded(teacher_folder, config.engine, precision, world), teacher_folder, inputs["teacher"], texts, folder, world)
    zero_shot_NC, student_NC = target(None, "zero-shot"), student(None, "student")
    classes = np.array(examples.classes)
    parents = {name: inputs[name] for name in ("teacher", "student")}
    table = [_row("zero-shot", zero_shot_NC, classes, None)]
    for each in tuned:
        source = read_prompt(each.source)
        check_belongs(source, student.model, target.model, student.tokenizer)
        prompts = {_ON_STUDENT: source} | {name: read_prompt(path) for name, path in each.on_target.items()}
        if target.takes(source):
            prompts["direct transfer"] = source
        scored = {name: (student if name == _ON_STUDENT else target)(prompt, name + each.label) for name, prompt in prompts.items()}
        biases = {name: torch.tensor(prompt.task.class_biases) for name, prompt in prompts.items() if prompt.task.class_biases}
        biased = scored | {name: scored[name] + bias for name, bias in biases.items()}
        biased["proxy-tuning"] = proxy_logits(student_NC, biased[_ON_STUDENT], zero_shot_NC, config.transfer.proxy_lambda)
        for name in filter(biased.__contains__, _ORDER):
            epsilon = prompts.get(name, source).epsilon
            table.append(_row(name + each.label, biased[name], classes, epsilon))
            if name in biases:
                table.append(_row(f"{name}{each.label}, without biases", scored[name], classes, epsilon))
        parents |= {name + each.label: prompt.manifest.digest for name, prompt in prompts.items()}
    said = {"task": task.name, "split": section.split} | ({"test_readings": readings} if readings else {}) | {"rows": table}

    def fill(artifact: Path) -> None:
        (artifact / TABLE).write_text(json.dumps(said, indent=2) + "\n")

    made_by = {"evaluate": section.model_dump(mode="json")}
    world.on_main(lambda: write_artefact(folder.artifact, "evaluation", fill, parents=parents, config=made_by))


@dataclass(frozen=True)
class _Texts:
    task: Task
    texts: list[str]
    digest: str


class _Scorer:
    """Class scores of the split's rows by one model, each computed once for all tables of a run's folder, and kept if one is stopped.

    They are of private rows: what keeps them is for the owner alone.
    """

    def __init__(self, model: LanguageModel, model_folder: Path, digest: str, texts: _Texts, folder: RunFolder, world: World) -> None:
        task = texts.task
        self.model, self.tokenizer = model, load_tokenizer(model_folder)
        self._template = Template(str(task.template), self.tokenizer, task.max_length, masked=model.masked)
        self._verbalizer = Verbalizer(tuple(task.labels.values()), self.tokenizer, allow_multi_token=task.allow_multi_token)
        self._rows = self._template.encode(texts.texts)
        settings = task.model_dump(mode="json", exclude={"path", "name"})
        self._question = {"model": digest, "texts": texts.digest, "task": settings}
        self._kept, self._batch_size, self._world = folder.path.parent / "scores", folder.config.evaluate.batch_size, world

    def takes(self, prompt: SoftPromptArtefact) -> bool:
        """Whether the model can read a prompt that was tuned on another."""
        return prompt.embeddings.shape[1] == self.model.width and prompt.manifest.tokenizer == tokenizer_fingerprint(self.tokenizer)

    def __call__(self, prompt: SoftPromptArtefact | None, label: str) -> torch.Tensor:
        """[N, C], without the biases of the prompt's task."""
        world, prompt_nd = self._world, None if prompt is None else prompt.embeddings.to(self._world.device)
        place = self._kept / digest_of({**self._question, "prompt": None if prompt is None else prompt.manifest.digest})[:16]
        if not world.from_main(place.exists()):
            how: dict[str, Any] = {"batch_size": self._batch_size, "world": world, "label": label}
            made = {"scores": answers(self.model, self._rows, self._template, prompt_nd, self._verbalizer.scores, **how)}

            def write() -> None:
                with writing(place):
                    self._kept.mkdir(mode=0o700, exist_ok=True)
                write_folder(place, lambda partial: save_file(made, partial / _SCORES))

            world.on_main(write)
        return world.from_main(load_file(place / _SCORES)["scores"] if world.is_main else torch.empty(0))


def _row(name: str, scores_NC: torch.Tensor, classes: np.ndarray, epsilon: float | None) -> dict[str, Any]:
    return {"name": name, **measure(scores_NC.numpy(), classes), "epsilon": epsilon}


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
