"""A LoRA on the student, behind a fixed prompt, as the part that tuning trains.

Each example gets its own copy of all factors. The gradient of the summed loss with respect to the
copies then holds the gradient of each example's own loss, exactly.

Shapes: B examples or units, n prompt tokens, d width, r rank, i inputs and o outputs of a layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from post_dist.artifacts.lora import Lora
from post_dist.artifacts.prompt import Adapter, PromptContents, SoftPromptArtifact
from post_dist.config.schema import RunConfig, Tune
from post_dist.conflicts import Conflict
from post_dist.data.template import Batch
from post_dist.models.adapted import adapted
from post_dist.models.classifier import PromptInput
from post_dist.models.facts import ModelFacts
from post_dist.models.lora_layers import lora_conflicts, untrained_lora
from post_dist.models.tuning_task import TuningTask, example_losses
from post_dist.privacy.gradients import unit_gradients
from post_dist.privacy.plain_batches import batch_of_like_length
from post_dist.privacy.scoring import answer_logits, count_right, validation_task
from post_dist.runtime.distributed import World
from post_dist.runtime.optimizers import averaging_from, make_optimizer


class LoraGradients:
    """Computes gradients with respect to each example's own copy of the factors.

    Args:
        task: the model, and the prompt in front.
        lora: current values of the factors.
    """

    def __init__(self, task: TuningTask, lora: Lora) -> None:
        self._task = task
        self._lora = lora

    def __call__(self, batch: Batch, targets: torch.Tensor) -> list[torch.Tensor]:
        """Return the per-example gradients [B, r, i] and [B, o, r] of all layers.

        Args:
            batch: the examples.
            targets: their classes [B], or the tokens of their responses [B, R].
        """
        # Each example gets leaf tensors of its own. Its gradient is taken with respect to them.
        task = self._task
        copies = []
        for factor in self._lora.factors.values():
            copy = factor.detach().expand(len(targets), *factor.shape)
            copies.append(copy.requires_grad_(True))
        prompt = PromptInput(prompt=task.start_nd)
        with adapted(task.model, self._lora.with_values(copies)):
            losses_B = example_losses(task.model, task.reader.verbalizer, batch, targets, prompt)
        # The SUM of losses: a mean would divide each gradient by the batch size before clipping.
        return list(torch.autograd.grad(losses_B.sum(), copies))


@dataclass(frozen=True)
class TunedLora:
    """The factors of a LoRA.

    Attributes:
        task: the model, the training examples, the prompt in front, and the LoRA to start from.
        config: the run file.
        sizes: number of examples in a micro-batch of each padded length.
        world: this process, alone.
    """

    task: TuningTask
    config: RunConfig
    sizes: Mapping[int, int]
    world: World

    @staticmethod
    def start(task: TuningTask, config: RunConfig, public: SoftPromptArtifact | None) -> Adapter:
        """Return a LoRA that changes nothing yet."""
        return untrained_lora(task.model, config.tune.lora_settings, config.seed)

    @staticmethod
    def conflicts(section: Tune, model: ModelFacts) -> list[Conflict]:
        """List the target modules that the student lacks, and more upper layers than it has."""
        # Facts come from the configuration, so nothing is loaded to find this out.
        return lora_conflicts("tune", section.lora_settings, model.linears, model.family)

    @staticmethod
    def start_conflicts(start: SoftPromptArtifact | None) -> list[Conflict]:
        """Return none: a LoRA stands behind a public prompt, or behind the embeddings of a text."""
        return []

    @staticmethod
    def contents(
        task: TuningTask, parameters: Sequence[torch.Tensor], statement: dict[str, Any] | None
    ) -> PromptContents:
        """Return the fixed prompt with the tuned LoRA."""
        # The prompt in front is public, so only the LoRA depends on private data.
        lora = task.need(Lora).with_values(parameters)
        return PromptContents(task.start_nd, task.reader.task, statement, lora)

    @property
    def units(self) -> Sequence[Sequence[int]]:
        """The examples of each unit of privacy."""
        return self.task.units

    def parameters(self) -> list[torch.Tensor]:
        """Return new copies of the factors to start from, on the model's device."""
        # A copy for each caller: every trial of a search starts from the same factors.
        factors = self.task.need(Lora).factors.values()
        return [factor.to(self.world.device, copy=True) for factor in factors]

    def optimizer(
        self, parameters: list[torch.Tensor], learning_rate: float, steps: int
    ) -> torch.optim.Optimizer:
        """Create the optimizer of the run file."""
        group = {"params": list(parameters), "lr": learning_rate, **averaging_from(steps)}
        return make_optimizer(self.config.tune.optimizer, [group])

    @staticmethod
    def results(
        task: TuningTask, section: Tune
    ) -> Callable[[Batch, torch.Tensor], list[torch.Tensor]]:
        """Return the gradients of a micro-batch, and its logits if trials are scored."""
        # The model may be cut to its first layers, so the LoRA is made for it. A second factor of
        # zeros would hide what rounds differently.
        lora = untrained_lora(task.model, section.lora_settings, seed=0)
        generator = torch.Generator().manual_seed(1)
        device = task.model.model.device
        values = []
        for factor in lora.factors.values():
            random = torch.randn(factor.shape, generator=generator)
            values.append((random / factor.shape[1] ** 0.5).to(device))
        lora = lora.with_values(values)
        gradients = LoraGradients(task, lora)

        def compute(batch: Batch, targets: torch.Tensor) -> list[torch.Tensor]:
            found = gradients(batch, targets)
            if section.search is not None:
                with adapted(task.model, lora):
                    found.append(answer_logits(task, batch, task.start_nd))
            return found

        return compute

    def gradients(
        self, parameters: Sequence[torch.Tensor], units: Sequence[int]
    ) -> Iterator[list[torch.Tensor]]:
        """Yield the gradients of a step's units, some of them at a time."""
        gradients = LoraGradients(self.task, self.task.need(Lora).with_values(parameters))
        return unit_gradients(
            self.task, parameters, units, self.sizes, self.world.device, lambda: gradients
        )

    def count_right(self, parameters: Sequence[torch.Tensor]) -> int:
        """Count the validation examples that the LoRA classifies correctly.

        Raises:
            InputError: the data have no validation examples.
            Interrupted: the run was asked to stop.
        """
        # Read the examples for each trial, so that they are in memory only while it is scored.
        validation = validation_task(self.task, self.config.need_task("private_task"))
        with adapted(self.task.model, self.task.need(Lora).with_values(parameters)):
            return count_right(validation, [self.task.start_nd], self.sizes, self.world)

    def loss(self, parameters: Sequence[torch.Tensor], step: int) -> torch.Tensor:
        """Return the mean loss of a batch of tuning without privacy."""
        # One LoRA serves the whole batch here, because no gradient is clipped.
        task = self.task
        batch, targets = batch_of_like_length(task, self.config, step, self.world.device)
        prompt = PromptInput(prompt=task.start_nd, shared=task.shares_prompt)
        with adapted(task.model, task.need(Lora).with_values(parameters)):
            losses_B = example_losses(task.model, task.reader.verbalizer, batch, targets, prompt)
        return losses_B.mean()
