"""Run one rival of `rivals.py` in this process."""

import hashlib
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiments import TWO_CORES
from few_shot import FewShot
from noisy_votes import Budget
from safetensors.torch import load_file, save_file
from synthetic_text import SyntheticText
from task_model import TaskModel
from utility import BENCHMARKS

from post_dist.bench.timing import device_name
from post_dist.config.load import load_run
from post_dist.data.tasks import load_examples
from post_dist.errors import InputError
from post_dist.models.load import model_folder
from post_dist.privacy.plan import declared_plan
from post_dist.runtime.distributed import World, start
from post_dist.runtime.logs import configure_logging
from post_dist.stages.evaluate.metrics import classification_metrics


@cache
def _this_process() -> World:
    """Return this process, which may be started only once."""
    return start(0)


class RivalRuns:
    """The rivals on one task and with one seed. Models and votes are kept from row to row.

    Args:
        settings: changes of `reviews.yaml`, as `KEY=VALUE`.
        opening: what precedes a text that the LLM writes.
        seed: draws everything.
        output: folder of the student.

    Attributes:
        device: name of the device.
    """

    def __init__(self, settings: list[str], opening: str, seed: int, output: Path) -> None:
        configure_logging(0)
        overrides = [*TWO_CORES, f"seed={seed}", *settings]
        self._config = load_run(BENCHMARKS / "reviews.yaml", overrides, output)
        self._opening = opening
        self._output = output
        self._seed = seed
        self._world = _this_process()
        self._task = self._config.need_task("private_task")
        self._private = load_examples(self._task, "train", "private_task")
        self.device = device_name(self._world.device)

    def row(self, rival: str, epsilon: float | None, split: str) -> dict[str, Any]:
        """Return the metrics of a rival.

        Args:
            rival: one of `RIVALS`.
            epsilon: target epsilon; None without noise.
            split: the split that is labeled.
        """
        examples = load_examples(self._task, split, "private_task")
        budget = Budget(epsilon, self._delta)
        scores_NC = self._scores(rival, examples.texts, budget)
        return classification_metrics(scores_NC.numpy(), np.array(examples.classes))

    def _scores(self, rival: str, texts: list[str], budget: Budget) -> torch.Tensor:
        if rival == "shots":
            return self._few_shot.with_true_labels(texts)
        if rival == "votes":
            return self._few_shot.with_votes(texts, budget)
        if rival == "synthetic shots":
            return self._few_shot.scores(texts, self._synthetic.shots(budget))
        return self._synthetic.head_scores(texts, budget)

    @property
    def _delta(self) -> float:
        return declared_plan(self._config, noise_multiplier=1.0).delta

    @cached_property
    def _llm(self) -> TaskModel:
        if self._config.teacher is None:
            raise InputError("the run file names no teacher")
        return TaskModel(model_folder(self._config.teacher), self._config, self._world)

    @cached_property
    def _few_shot(self) -> FewShot:
        return FewShot(self._llm, self._private, self._seed)

    @cached_property
    def _synthetic(self) -> SyntheticText:
        classes_N = np.array(self._private.classes)
        private_Nd = self._embeddings()
        folder = self._output / self._task.name.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        return SyntheticText(self._llm, private_Nd, classes_N, self._opening, self._seed, folder)

    def _embeddings(self) -> torch.Tensor:
        """Return the embeddings of the private texts, which are the same for every seed."""
        texts = self._private.texts
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
        file = self._output / f"embeddings-{digest[:16]}.safetensors"
        if not file.exists():
            save_file({"means": self._llm.embeddings(texts)}, file)
        return load_file(file)["means"]
