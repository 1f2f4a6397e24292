"""Run the pipeline in this process, for `utility.py`. This module is not a program itself."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from post_dist.artifacts.manifest import read_manifest
from post_dist.artifacts.prompt import read_prompt
from post_dist.bench.timing import device_name
from post_dist.config.load import load_run
from post_dist.config.schema import STAGE_SECTIONS, RunConfig
from post_dist.data.tasks import load_examples
from post_dist.models.load import load_whole
from post_dist.privacy.micro_batches import planned_sizes, size_of_longest
from post_dist.privacy.tuned_head import TunedHead
from post_dist.report import read_table
from post_dist.runtime.distributed import start
from post_dist.runtime.logs import configure_logging
from post_dist.runtime.precision import choose_precision
from post_dist.stages.evaluate.cached_answers import CachedAnswers, EvaluatedModel, EvaluationSplit
from post_dist.stages.evaluate.metrics import classification_metrics
from post_dist.stages.pipeline import Pipeline
from post_dist.stages.tune.stage import load_task
from post_dist.stages.tune.tuned_model import TunedModel

_STAGES = frozenset(STAGE_SECTIONS)

Row = dict[str, Any]
"""One line of an evaluation table, as `post-dist evaluate --json` prints it."""


class Harness:
    """Runs one run file with different settings. Finished stages are kept and used again.

    Args:
        run: the run file.
        output: folder of the runs.

    Attributes:
        device: name of the device.
    """

    def __init__(self, run: Path, output: Path) -> None:
        configure_logging(0)
        self._run = run
        self._output = output
        self._world = start(0)
        self.device = device_name(self._world.device)

    def pipeline_table(self, settings: list[str]) -> list[Row]:
        """Run the pipeline and return the rows of its evaluation table.

        Args:
            settings: changes of the run file, as `KEY=VALUE`.
        """
        evaluation = self._pipeline(self._config(settings)).everything()
        rows: list[Row] = read_table(evaluation.path)["rows"]
        return rows

    def student_row(self, settings: list[str], epsilon: float) -> Row:
        """Tune a private prompt and return its row on the student, without a transfer.

        Args:
            settings: changes of the run file, as `KEY=VALUE`.
            epsilon: target epsilon.
        """
        # Stages that an earlier experiment has finished are taken from the folder of runs.
        config = self.private_config(settings, epsilon)
        pipeline = self._pipeline(config)
        prompt = read_prompt(pipeline.tune().artifact)
        answers = self._answers(config, pipeline.student, pipeline.student_digest)
        scores_NC = answers.answers(prompt, f"student + prompt, epsilon {epsilon:g}")
        # Class biases are part of the tuned prompt, and the cache holds scores without them.
        scores_NC = scores_NC + torch.tensor(prompt.task.class_biases or [0.0])
        return {"name": "student + prompt", **_metrics(scores_NC, answers)}

    def given_away(self, settings: list[str]) -> Row:
        """Distill a student, attack it, and return what it gives away of its teacher.

        Args:
            settings: changes of the run file, as `KEY=VALUE`.
        """
        config = self._config(settings)
        pipeline = self._pipeline(config)
        found = read_manifest(pipeline.student, "student").config
        teacher = self._answers(config, pipeline.inputs.teacher, pipeline.inputs.teacher_digest)
        zero_shot = {
            "teacher": _metrics(teacher.answers(None, "teacher"), teacher),
            "student": self.untuned_row(settings),
        }
        return {**found["given_away"], "perplexity": found["perplexity"], "zero-shot": zero_shot}

    def student(self, settings: list[str]) -> Path:
        """Find or make the student, and return its folder.

        Args:
            settings: changes of the run file, as `KEY=VALUE`.
        """
        return self._pipeline(self._config(settings)).student

    def untuned_row(self, settings: list[str]) -> Row:
        """Return the row of the student without a prompt.

        Args:
            settings: changes of the run file, as `KEY=VALUE`.
        """
        config = self._config(settings)
        pipeline = self._pipeline(config)
        answers = self._answers(config, pipeline.student, pipeline.student_digest)
        return {"name": "student", **_metrics(answers.answers(None, "student"), answers)}

    def head(self, settings: list[str]) -> tuple[TunedHead, int]:
        """Return an untrained head that has read its examples, and how many the validation has.

        Args:
            settings: changes of the run file, as `KEY=VALUE`.
        """
        config = self._config(settings)
        pipeline = self._pipeline(config)
        model = TunedModel(
            pipeline.student, pipeline.student_digest, "student", pipeline.public_prompt
        )
        task = load_task(config.private_task, config, model, self._world)
        sizes = planned_sizes(task, size_of_longest(config.tune, task))
        validation = load_examples(config.private_task, "validation", "private_task")
        return TunedHead(task, config, sizes, self._world), len(validation.texts)

    def private_config(self, settings: list[str], epsilon: float) -> RunConfig:
        """Return the run file of a private run.

        Args:
            settings: changes of the run file, as `KEY=VALUE`.
            epsilon: target epsilon.
        """
        config = self._config(settings)
        return config.model_copy(update={"privacy": config.privacy.for_target(epsilon)})

    def _answers(self, config: RunConfig, folder: Path, digest: str) -> CachedAnswers:
        """Return the answers of a model, which are cached by model and prompt, as in `evaluate`."""
        split = config.evaluate.split
        examples = load_examples(config.private_task, split, "private_task")
        precision = choose_precision(config.engine, self._world.device)
        model = load_whole(folder, precision, self._world.device)
        return CachedAnswers(
            EvaluatedModel(model, folder, digest),
            EvaluationSplit(config.private_task, examples, split),
            self._output / "answers",
            config.evaluate.batch_size,
            self._world,
        )

    def _pipeline(self, config: RunConfig) -> Pipeline:
        return Pipeline(config, self._world, _STAGES)

    def _config(self, settings: list[str]) -> RunConfig:
        return load_run(self._run, settings, self._output)


def _metrics(scores_NC: torch.Tensor, answers: CachedAnswers) -> Row:
    return classification_metrics(scores_NC.numpy(), np.array(answers.examples.classes))
