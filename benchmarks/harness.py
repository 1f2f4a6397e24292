"""What `utility.py` measures with: the pipeline in this process, and DP-LoRA by the data's owner."""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from post_dist.artifacts.manifest import read_manifest
from post_dist.artifacts.prompt import read_prompt
from post_dist.bench.peers import OpacusLora
from post_dist.bench.timing import device_name
from post_dist.config.load import load_run
from post_dist.config.schema import RunConfig
from post_dist.data.tasks import load_examples
from post_dist.data.template import Template
from post_dist.data.verbalizer import Verbalizer
from post_dist.models.batch_inference import InferenceRun, outputs_at_answers
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.privacy.accounting import account, private_plan
from post_dist.privacy.mechanism import PrivateOptimizer
from post_dist.privacy.randomness import RandomSource
from post_dist.report import read_table
from post_dist.runtime.distributed import start
from post_dist.runtime.logs import speak
from post_dist.runtime.precision import choose_precision
from post_dist.runtime.progress import progress
from post_dist.runtime.schedule import Schedule
from post_dist.stages.evaluate.cached_answers import CachedAnswers, EvaluatedModel, EvaluationSplit
from post_dist.stages.evaluate.metrics import classification_metrics
from post_dist.stages.pipeline import Pipeline

_STAGES = frozenset({"distill", "tune", "transfer", "evaluate"})
_RANK = 8
_RATES = (1e-3, 4e-3)
_MICRO_BATCH = 16


class Laboratory:
    """Runs the demo's run file with other settings, and leaves what is finished in one folder."""

    def __init__(self, run: Path, output: Path) -> None:
        speak(0)
        self._run, self._output, self._world = run, output, start(0)
        self.device = device_name(self._world.device)

    def table(self, settings: list[str]) -> list[dict[str, Any]]:
        """The rows of the pipeline's table."""
        made = Pipeline(self._config(settings), self._world, _STAGES).everything()
        rows: list[dict[str, Any]] = read_table(made.path)["rows"]
        return rows

    def made(self, settings: list[str], *, with_prompt: bool) -> list[str]:
        """Further settings, which take up the student of some settings, and the prompt that was tuned on it."""
        pipeline = Pipeline(self._config(settings), self._world, _STAGES)
        prompt = [f"inputs.source_prompt={pipeline.tune().artifact}"] if with_prompt else []
        return [f"inputs.student={pipeline.student}", *prompt]

    def student(self, settings: list[str], epsilon: float) -> list[dict[str, Any]]:
        """The row of a private prompt on the student, without any transfer."""
        config = self._private(settings, epsilon)
        pipeline, task = Pipeline(config, self._world, _STAGES), config.private_task
        prompt, student = read_prompt(pipeline.tune().artifact), pipeline.student
        model = load_whole(
            student, choose_precision(config.engine, self._world.device), self._world.device
        )
        examples, digest = (
            load_examples(task, config.evaluate.split, "private_task"),
            read_manifest(student, "student").digest,
        )
        answers = CachedAnswers(
            EvaluatedModel(model, student, digest),
            EvaluationSplit(task, examples, config.evaluate.split),
            self._output / "answers",
            config.evaluate.batch_size,
            self._world,
        )
        scores_NC = answers.answers(
            prompt, f"student + prompt, epsilon {epsilon:g}"
        ) + torch.tensor(prompt.task.class_biases or [0.0])
        return [
            {
                "name": "student + prompt",
                **classification_metrics(scores_NC.numpy(), np.array(examples.classes)),
            }
        ]

    def lora(self, settings: list[str], epsilon: float) -> list[dict[str, Any]]:
        """DP-LoRA on the student, with the plan that the prompt is tuned with.

        The better of two learning rates by the validation split: a favour to it, for nothing pays for that choice.
        """
        config = self._private(settings, epsilon)
        student = Pipeline(config, self._world, _STAGES).student
        tried = {rate: self._tuned_by_lora(config, student, rate) for rate in _RATES}
        best = max(_RATES, key=lambda rate: tried[rate]("validation")["accuracy_micro"])
        row = {"name": f"DP-LoRA on the student, epsilon {epsilon:g}", **tried[best]("test")}
        return [row | {"epsilon": account(private_plan(config)).epsilon, "learning_rate": best}]

    def _tuned_by_lora(
        self, config: RunConfig, student: Path, learning_rate: float
    ) -> Callable[[str], dict[str, Any]]:
        """Train, and give what measures the result on a split."""
        torch.manual_seed(config.seed)
        task, plan, tokenizer = config.private_task, private_plan(config), load_tokenizer(student)
        model = load_whole(
            student, choose_precision(config.engine, self._world.device), self._world.device
        )
        template = Template(task.template, tokenizer, task.max_length, masked=False)
        verbalizer = Verbalizer(
            tuple(task.labels.values()), tokenizer, allow_multi_token=task.allow_multi_token
        )
        examples = load_examples(task, "train", "private_task")
        rows, classes = template.encode(examples.texts), torch.tensor(examples.classes)
        lora = OpacusLora(model, verbalizer, _RANK)
        source = RandomSource("lora", secrets.token_bytes(32))
        optimizer = PrivateOptimizer(
            torch.optim.Adam(lora.parameters, lr=learning_rate), plan, source
        )
        schedule = Schedule(config.tune.schedule, config.tune.warmup_share, plan.steps)
        with progress(f"DP-LoRA at rate {learning_rate}", plan.steps, show=True) as advance:
            for step in range(plan.steps):
                optimizer.param_groups[0]["lr"] = learning_rate * schedule.factor(step)
                chosen = sorted(
                    plan.sampler.draw(source, len(rows), step),
                    key=lambda row: len(rows[row].token_ids),
                )
                for first in range(0, len(chosen), _MICRO_BATCH):
                    part = chosen[first : first + _MICRO_BATCH]
                    batch = template.collate([rows[row] for row in part]).to(self._world.device)
                    optimizer.accumulate(lora(batch, classes[part].to(self._world.device)))
                optimizer.finish(step, lambda commitment: None)
                advance("")

        def measured(split: str) -> dict[str, Any]:
            examples = load_examples(task, split, "private_task")
            run = InferenceRun(config.evaluate.batch_size, self._world, f"DP-LoRA, {split}")
            scores_NC = outputs_at_answers(
                model, template.encode(examples.texts), template, None, verbalizer.scores, run
            )
            return classification_metrics(scores_NC.numpy(), np.array(examples.classes))

        return measured

    def _private(self, settings: list[str], epsilon: float) -> RunConfig:
        config = self._config(settings)
        return config.model_copy(update={"privacy": config.privacy.for_target(epsilon)})

    def _config(self, settings: list[str]) -> RunConfig:
        return load_run(self._run, settings, self._output)
