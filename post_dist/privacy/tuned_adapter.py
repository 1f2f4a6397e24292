"""What tuning of a LoRA and of a prefix has in common.

Each example gets its own copy of all values of the adapter. The gradient of the summed loss with
respect to the copies then holds the gradient of each example's own loss, exactly.

Shapes: B examples or units.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from post_dist.artifacts.lora import Lora
from post_dist.artifacts.prefix import Prefix
from post_dist.artifacts.prompt import PromptContents
from post_dist.config.schema import RunConfig, Tune
from post_dist.data.template import Batch
from post_dist.models.adapted import adapted
from post_dist.models.classifier import PromptInput
from post_dist.models.tuning_task import TuningTask, example_losses
from post_dist.privacy.gradients import unit_gradients
from post_dist.privacy.lower_states import LowerStates
from post_dist.privacy.plain_batches import batch_of_like_length
from post_dist.privacy.scoring import answer_logits, count_right, validation_task
from post_dist.runtime.distributed import World
from post_dist.runtime.optimizers import averaging_from, make_optimizer


class AdapterGradients:
    """Computes gradients with respect to each example's own copy of an adapter's values.

    Args:
        task: the model and the form of the task.
        adapter: the current values.
        prompt: the prompt in front of each text, if the adapter leaves it there.
        below: the outputs of the layers below the adapter; None to run all layers.
    """

    def __init__(
        self,
        task: TuningTask,
        adapter: Lora | Prefix,
        prompt: PromptInput,
        below: LowerStates | None = None,
    ) -> None:
        self._task = task
        self._adapter = adapter
        self._prompt = prompt
        self._below = below

    def __call__(self, batch: Batch, targets: torch.Tensor) -> list[torch.Tensor]:
        """Return the per-example gradients [B, ...] of all values.

        Args:
            batch: the examples.
            targets: their classes [B], or the tokens of their responses [B, R].
        """
        # Each example gets leaf tensors of its own. Its gradient is taken with respect to them.
        task = self._task
        copies = []
        for value in self._adapter.values:
            copy = value.detach().expand(len(targets), *value.shape)
            copies.append(copy.requires_grad_(True))
        lower = self._below.given(batch) if self._below else nullcontext()
        with adapted(task.model, self._adapter.with_values(copies)), lower:
            losses_B = example_losses(
                task.model, task.reader.verbalizer, batch, targets, self._prompt
            )
        # The SUM of losses: a mean would divide each gradient by the batch size before clipping.
        return list(torch.autograd.grad(losses_B.sum(), copies))


@dataclass(frozen=True)
class TunedAdapter(ABC):
    """The values of an adapter, of which each example can have its own copy.

    Attributes:
        task: the model, the training examples, the prompt, and the adapter to start from.
        config: the run file.
        sizes: number of examples in a micro-batch of each padded length.
        world: this process, alone.
        kind: the class of the adapter.
    """

    kind: ClassVar[type[Lora] | type[Prefix]]

    task: TuningTask
    config: RunConfig
    sizes: Mapping[int, int]
    world: World

    @staticmethod
    @abstractmethod
    def prompt_in_front(task: TuningTask, *, shared: bool = False) -> PromptInput:
        """Return the prompt that stands in front of a text beside the adapter.

        Args:
            task: has the fixed prompt.
            shared: run it once for all examples of a batch.
        """

    @staticmethod
    @abstractmethod
    def probe(task: TuningTask, section: Tune) -> Lora | Prefix:
        """Return an adapter of the task's model for a trial of micro-batches.

        The model may be cut to its first layers, so it is not the adapter to start from.
        """

    @classmethod
    def contents(
        cls, task: TuningTask, parameters: Sequence[torch.Tensor], statement: dict[str, Any] | None
    ) -> PromptContents:
        """Return the fixed prompt with the tuned adapter."""
        # The prompt is public, so only the adapter depends on private data.
        adapter = task.need(cls.kind).with_values(parameters)
        return PromptContents(task.start_nd, task.reader.task, statement, adapter)

    @property
    def below(self) -> LowerStates | None:
        """The outputs of the layers below the adapter, if they are kept from step to step."""
        return None

    @property
    def units(self) -> Sequence[Sequence[int]]:
        """The examples of each unit of privacy."""
        return self.task.units

    def parameters(self) -> list[torch.Tensor]:
        """Return new copies of the values to start from, on the model's device."""
        # A copy for each caller: every trial of a search starts from the same values.
        values = self.task.need(self.kind).values
        return [value.to(self.world.device, copy=True) for value in values]

    def optimizer(
        self, parameters: list[torch.Tensor], learning_rate: float, steps: int
    ) -> torch.optim.Optimizer:
        """Create the optimizer of the run file."""
        group = {"params": list(parameters), "lr": learning_rate, **averaging_from(steps)}
        return make_optimizer(self.config.tune.optimizer, [group])

    @classmethod
    def results(
        cls, task: TuningTask, section: Tune
    ) -> Callable[[Batch, torch.Tensor], list[torch.Tensor]]:
        """Return the gradients of a micro-batch, and its logits if right answers are counted."""
        adapter = cls.probe(task, section)
        gradients = AdapterGradients(task, adapter, cls.prompt_in_front(task))

        def compute(batch: Batch, targets: torch.Tensor) -> list[torch.Tensor]:
            found = gradients(batch, targets)
            # A run that also counts right answers needs scores that depend on no other example.
            if section.counts_right:
                with adapted(task.model, adapter):
                    found.append(answer_logits(task, batch, task.start_nd))
            return found

        return compute

    def gradients(
        self, parameters: Sequence[torch.Tensor], units: Sequence[int]
    ) -> Iterator[list[torch.Tensor]]:
        """Yield the gradients of a step's units, some of them at a time."""
        # One object serves all micro-batches of the step: the values do not change within it.
        prompt = self.prompt_in_front(self.task)
        gradients = AdapterGradients(self.task, self._with(parameters), prompt, self.below)
        return unit_gradients(
            self.task, parameters, units, self.sizes, self.world.device, lambda: gradients
        )

    def count_right(self, parameters: Sequence[torch.Tensor]) -> int:
        """Count the validation examples that the adapter classifies correctly.

        Raises:
            InputError: the data have no validation examples.
            Interrupted: the run was asked to stop.
        """
        # Read the examples for each trial, so that they are in memory only while it is scored.
        validation = validation_task(self.task, self.config.need_task("private_task"))
        with adapted(self.task.model, self._with(parameters)):
            return count_right(validation, [self.task.start_nd], self.sizes, self.world)

    def loss(self, parameters: Sequence[torch.Tensor], step: int) -> torch.Tensor:
        """Return the mean loss of a batch of tuning without privacy."""
        # One adapter serves the whole batch here, because no gradient is clipped.
        task = self.task
        batch, targets = batch_of_like_length(task, self.config, step, self.world.device)
        prompt = self.prompt_in_front(task, shared=task.shares_prompt)
        with adapted(task.model, self._with(parameters)):
            losses_B = example_losses(task.model, task.reader.verbalizer, batch, targets, prompt)
        return losses_B.mean()

    def _with(self, parameters: Sequence[torch.Tensor]) -> Lora | Prefix:
        """Return the adapter with other values."""
        return self.task.need(self.kind).with_values(parameters)
