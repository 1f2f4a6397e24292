"""DP-LoRA on the student: what a data owner could do alone. For `utility.py`.

Shapes: N examples, C classes.
"""

import secrets
from pathlib import Path
from typing import Any

import numpy as np
import torch

from post_dist.artifacts.task import PromptTask
from post_dist.bench.peers.tuning import OpacusLora
from post_dist.config.schema import RunConfig
from post_dist.data.task_reader import TaskReader
from post_dist.data.tasks import load_examples
from post_dist.models.batch_inference import InferenceRun, outputs_at_answers
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.privacy.calibration import private_plan
from post_dist.privacy.mechanism import PrivateOptimizer
from post_dist.privacy.randomness import RandomSource
from post_dist.runtime.distributed import World
from post_dist.runtime.precision import choose_precision
from post_dist.runtime.progress import progress
from post_dist.runtime.schedule import Schedule
from post_dist.stages.evaluate.metrics import classification_metrics

_LORA_RANK = 8
_MICRO_BATCH_SIZE = 16


class DPLora:
    """The student with a LoRA that was trained on private examples.

    Args:
        config: a run file with a private plan.
        model: the student; LoRA changes it.
        reader: the private task, bound to the student's tokenizer.
        learning_rate: learning rate of the training.
        world: a single rank.
    """

    def __init__(
        self,
        config: RunConfig,
        model: LanguageModel,
        reader: TaskReader,
        learning_rate: float,
        world: World,
    ) -> None:
        self.learning_rate = learning_rate
        self._config = config
        self._model = model
        self._reader = reader
        self._world = world

    @classmethod
    def train(
        cls, config: RunConfig, student: Path, learning_rate: float, world: World
    ) -> "DPLora":
        """Train with the privacy plan, the schedule and the examples that a prompt is tuned with.

        Args:
            config: a run file with a private plan.
            student: folder of the student.
            learning_rate: learning rate of Adam at the schedule's peak.
            world: a single rank.
        """
        torch.manual_seed(config.seed)
        precision = choose_precision(config.engine, world.device)
        model = load_whole(student, precision, world.device)
        task = PromptTask.of_section(config.private_task, config.tune.init_text)
        reader = TaskReader(task, load_tokenizer(student), masked=False)
        trained = cls(config, model, reader, learning_rate, world)
        trained._train()
        return trained

    def _train(self) -> None:
        # Examples, order and plan are those of prompt tuning: only what is trained differs.
        config = self._config
        plan = private_plan(config)
        device = self._world.device
        examples = load_examples(config.private_task, "train", "private_task")
        encoded = self._reader.encode(examples.texts)
        classes_N = torch.tensor(examples.classes)
        # LoRA, with clipping and noise from the optimizer that prompts are tuned with.
        lora = OpacusLora(self._model, self._reader.verbalizer, _LORA_RANK)
        source = RandomSource("lora", secrets.token_bytes(32))
        optimizer = PrivateOptimizer(
            torch.optim.Adam(lora.parameters, lr=self.learning_rate), plan, source
        )
        schedule = Schedule(config.tune.schedule, config.tune.warmup_share, plan.steps)
        # An empty Poisson batch still takes its noisy step, as the accounting requires.
        label = f"DP-LoRA at rate {self.learning_rate}"
        with progress(label, plan.steps, show=True) as advance:
            for step in range(plan.steps):
                optimizer.param_groups[0]["lr"] = self.learning_rate * schedule.factor(step)
                chosen = plan.sampler.draw(source, len(encoded), step)
                # Micro-batches of examples of about equal length need little padding.
                chosen.sort(key=lambda index: len(encoded[index].token_ids))
                for first in range(0, len(chosen), _MICRO_BATCH_SIZE):
                    part = chosen[first : first + _MICRO_BATCH_SIZE]
                    batch = self._reader.collate([encoded[index] for index in part])
                    optimizer.accumulate(lora(batch.to(device), classes_N[part].to(device)))
                # This benchmark's data are public, so no ledger takes the commitment.
                optimizer.finish(step, lambda commitment: None)
                advance("")

    def measure(self, split: str) -> dict[str, Any]:
        """Return the metrics on a split of the private task.

        Args:
            split: train, validation or test.
        """
        examples = load_examples(self._config.private_task, split, "private_task")
        run = InferenceRun(self._config.evaluate.batch_size, self._world, f"DP-LoRA, {split}")
        scores_NC = outputs_at_answers(
            self._model,
            self._reader.encode(examples.texts),
            self._reader.template,
            None,
            self._reader.scores,
            run,
        )
        return classification_metrics(scores_NC.numpy(), np.array(examples.classes))
