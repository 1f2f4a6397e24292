"""A prefix in place of the prompt that it starts from, as the part that tuning trains.

Each example gets its own copy of the keys and values of all layers. The gradient of the summed loss
with respect to the copies then holds the gradient of each example's own loss, exactly. No hooks are
needed: the keys and values of virtual tokens enter the model through its cache, one for each
example.

Shapes: B examples or units, n virtual tokens, h key heads, w width of a key and of a value.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from post_dist.artifacts.prefix import Prefix
from post_dist.artifacts.prompt import Adapter, PromptContents, SoftPromptArtifact
from post_dist.config.schema import RunConfig, Tune
from post_dist.conflicts import Conflict
from post_dist.data.template import Batch
from post_dist.models.adapted import adapted
from post_dist.models.classifier import PromptInput
from post_dist.models.facts import ModelFacts
from post_dist.models.prefix_layers import initial_prefix, prefix_conflicts
from post_dist.models.tuning_task import TuningTask, example_losses
from post_dist.privacy.gradients import unit_gradients
from post_dist.privacy.plain_batches import batch_of_like_length
from post_dist.privacy.scoring import answer_logits, count_right, validation_task
from post_dist.runtime.distributed import World
from post_dist.runtime.optimizers import averaging_from, make_optimizer


class PrefixGradients:
    """Computes gradients with respect to each example's own copy of the keys and values.

    Args:
        task: the model and the form of the task.
        prefix: current keys and values.
    """

    def __init__(self, task: TuningTask, prefix: Prefix) -> None:
        self._task = task
        self._prefix = prefix

    def __call__(self, batch: Batch, targets: torch.Tensor) -> list[torch.Tensor]:
        """Return the per-example gradients [B, h, n, w] of the keys and values of all layers.

        Args:
            batch: the examples.
            targets: their classes [B], or the tokens of their responses [B, R].
        """
        # Each example gets leaf tensors of its own. Its gradient is taken with respect to them.
        task = self._task
        copies = []
        for part in self._prefix.keys_and_values:
            copy = part.detach().expand(len(targets), *part.shape)
            copies.append(copy.requires_grad_(True))
        with adapted(task.model, self._prefix.with_values(copies)):
            losses_B = example_losses(
                task.model, task.reader.verbalizer, batch, targets, PromptInput()
            )
        # The SUM of losses: a mean would divide each gradient by the batch size before clipping.
        return list(torch.autograd.grad(losses_B.sum(), copies))


@dataclass(frozen=True)
class TunedPrefix:
    """The keys and values of a prefix.

    Attributes:
        task: the model, the training examples, and the prefix to start from.
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
        """Return the keys and values of the prompt, so that nothing has changed yet."""
        return initial_prefix(task.model, task.start_nd)

    @staticmethod
    def conflicts(section: Tune, model: ModelFacts) -> list[Conflict]:
        """Find that a student keeps no keys and values, or not of one shape in all layers."""
        # Facts come from the configuration, so nothing is loaded to find this out.
        return prefix_conflicts(model, section.num_virtual_tokens)

    @staticmethod
    def start_conflicts(start: SoftPromptArtifact | None, model: ModelFacts) -> list[Conflict]:
        """Return none: a prefix starts from a public prompt, or from the embeddings of a text."""
        return []

    @staticmethod
    def contents(
        task: TuningTask, parameters: Sequence[torch.Tensor], statement: dict[str, Any] | None
    ) -> PromptContents:
        """Return the tuned prefix, with the prompt that it started from."""
        # That prompt is public, so only the prefix depends on private data.
        prefix = task.need(Prefix).with_values(parameters)
        return PromptContents(task.start_nd, task.reader.task, statement, prefix)

    @property
    def units(self) -> Sequence[Sequence[int]]:
        """The examples of each unit of privacy."""
        return self.task.units

    def parameters(self) -> list[torch.Tensor]:
        """Return new copies of the keys and values to start from, on the model's device."""
        # A copy for each caller: every trial of a search starts from the same prefix.
        parts = self.task.need(Prefix).keys_and_values
        return [part.to(self.world.device, copy=True) for part in parts]

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
        # The model may be cut to its first layers, so the prefix is made for it.
        prefix = initial_prefix(task.model, task.start_nd)
        gradients = PrefixGradients(task, prefix)

        def compute(batch: Batch, targets: torch.Tensor) -> list[torch.Tensor]:
            found = gradients(batch, targets)
            if section.search is not None:
                with adapted(task.model, prefix):
                    found.append(answer_logits(task, batch, task.start_nd))
            return found

        return compute

    def gradients(
        self, parameters: Sequence[torch.Tensor], units: Sequence[int]
    ) -> Iterator[list[torch.Tensor]]:
        """Yield the gradients of a step's units, some of them at a time."""
        gradients = PrefixGradients(self.task, self.task.need(Prefix).with_values(parameters))
        return unit_gradients(
            self.task, parameters, units, self.sizes, self.world.device, lambda: gradients
        )

    def count_right(self, parameters: Sequence[torch.Tensor]) -> int:
        """Count the validation examples that the prefix classifies correctly.

        Raises:
            InputError: the data have no validation examples.
            Interrupted: the run was asked to stop.
        """
        # Read the examples for each trial, so that they are in memory only while it is scored.
        validation = validation_task(self.task, self.config.need_task("private_task"))
        with adapted(self.task.model, self.task.need(Prefix).with_values(parameters)):
            return count_right(validation, [self.task.start_nd], self.sizes, self.world)

    def loss(self, parameters: Sequence[torch.Tensor], step: int) -> torch.Tensor:
        """Return the mean loss of a batch of tuning without privacy."""
        # One prefix serves the whole batch here, because no gradient is clipped.
        task = self.task
        batch, targets = batch_of_like_length(task, self.config, step, self.world.device)
        with adapted(task.model, task.need(Prefix).with_values(parameters)):
            losses_B = example_losses(
                task.model, task.reader.verbalizer, batch, targets, PromptInput()
            )
        return losses_B.mean()
