"""The prompt, with the biases of the classes if they are tuned, as the part that tuning trains.

Shapes: B examples or units, n prompt tokens, d width, C classes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from post_dist.artifacts.prompt import Adapter, PromptContents, SoftPromptArtifact
from post_dist.config.schema import RunConfig, Tune
from post_dist.conflicts import Conflict
from post_dist.data.template import Batch
from post_dist.models.classifier import BIAS_RATE, BIAS_SCALE, PromptInput
from post_dist.models.facts import ModelFacts
from post_dist.models.tuning_task import TuningTask, example_losses
from post_dist.privacy.gradients import task_gradients, unit_gradients
from post_dist.privacy.plain_batches import batch_of_like_length
from post_dist.privacy.scoring import answer_logits, count_right, validation_task
from post_dist.runtime.distributed import World
from post_dist.runtime.optimizers import averaging_from, make_optimizer


def prompt_parameters(task: TuningTask, section: Tune) -> list[torch.Tensor]:
    """Return new fp32 parameters: the prompt [n, d], and zero biases [C] if they are tuned."""
    # A copy for each caller: every trial of a search starts from the same prompt.
    start = task.start_nd.to(torch.float32).clone()
    if not section.class_bias:
        return [start]
    return [start, start.new_zeros(task.reader.num_classes)]


@dataclass(frozen=True)
class TunedPrompt:
    """The prompt [n, d], and the bias parameters [C] if they are tuned.

    Attributes:
        task: the model, the training examples and the initial prompt.
        config: the run file.
        sizes: number of examples in a micro-batch of each padded length.
        world: this process, alone.
    """

    task: TuningTask
    config: RunConfig
    sizes: Mapping[int, int]
    world: World

    @staticmethod
    def start(
        task: TuningTask, config: RunConfig, public: SoftPromptArtifact | None
    ) -> Adapter | None:
        """Return no adapter: the prompt itself is tuned."""
        return None

    @staticmethod
    def conflicts(section: Tune, model: ModelFacts) -> list[Conflict]:
        """Return none: every model takes a prompt."""
        return []

    @staticmethod
    def start_conflicts(start: SoftPromptArtifact | None, model: ModelFacts) -> list[Conflict]:
        """Return none: tuning starts from a public prompt, or from the embeddings of a text."""
        return []

    @staticmethod
    def contents(
        task: TuningTask, parameters: Sequence[torch.Tensor], statement: dict[str, Any] | None
    ) -> PromptContents:
        """Return the tuned prompt. Its task carries the biases, in units of the class scores."""
        prompt_task = task.reader.task
        if len(parameters) > 1:
            biases = tuple((BIAS_SCALE * parameters[1]).tolist())
            prompt_task = replace(prompt_task, class_biases=biases)
        return PromptContents(parameters[0], prompt_task, statement)

    @property
    def units(self) -> Sequence[Sequence[int]]:
        """The examples of each unit of privacy."""
        return self.task.units

    def parameters(self) -> list[torch.Tensor]:
        """Return the initial prompt, and zero biases if they are tuned."""
        return prompt_parameters(self.task, self.config.tune)

    def optimizer(
        self, parameters: list[torch.Tensor], learning_rate: float, steps: int
    ) -> torch.optim.Optimizer:
        """Create the optimizer of the run file. The class biases have their own learning rate.

        Args:
            parameters: as `parameters` returns them.
            learning_rate: learning rate of the prompt.
            steps: number of steps of the training.
        """
        # One group for each parameter, because each has its own learning rate.
        groups = [{"params": [parameters[0]], "lr": learning_rate, **averaging_from(steps)}]
        if len(parameters) > 1:
            rate = learning_rate * BIAS_RATE
            groups.append({"params": [parameters[1]], "lr": rate, **averaging_from(steps)})
        return make_optimizer(self.config.tune.optimizer, groups)

    @staticmethod
    def results(
        task: TuningTask, section: Tune
    ) -> Callable[[Batch, torch.Tensor], list[torch.Tensor]]:
        """Return the gradients of a micro-batch, and its logits if right answers are counted."""
        parameters = prompt_parameters(task, section)
        gradients = task_gradients(task, parameters)

        def compute(batch: Batch, targets: torch.Tensor) -> list[torch.Tensor]:
            found = gradients(batch, targets)
            if section.counts_right:
                found.append(answer_logits(task, batch, parameters[0]))
            return found

        return compute

    def gradients(
        self, parameters: Sequence[torch.Tensor], units: Sequence[int]
    ) -> Iterator[list[torch.Tensor]]:
        """Yield the gradients of a step's units, some of them at a time."""
        return unit_gradients(self.task, parameters, units, self.sizes, self.world.device)

    def count_right(self, parameters: Sequence[torch.Tensor]) -> int:
        """Count the validation examples that the prompt classifies correctly.

        Raises:
            InputError: the data have no validation examples.
            Interrupted: the run was asked to stop.
        """
        # Read the examples for each trial, so that they are in memory only while it is scored.
        validation = validation_task(self.task, self.config.need_task("private_task"))
        return count_right(validation, parameters, self.sizes, self.world)

    def loss(self, parameters: Sequence[torch.Tensor], step: int) -> torch.Tensor:
        """Return the mean loss of a batch of tuning without privacy."""
        task = self.task
        batch, targets = batch_of_like_length(task, self.config, step, self.world.device)
        prompt = PromptInput(prompt=parameters[0], shared=task.shares_prompt)
        bias = parameters[1] if len(parameters) > 1 else None
        losses_B = example_losses(task.model, task.reader.verbalizer, batch, targets, prompt, bias)
        return losses_B.mean()
