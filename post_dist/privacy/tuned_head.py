"""A linear head behind a fixed prompt, as the part that tuning trains.

The hidden states behind the prompt do not change during the training. They are computed once, and a
step then takes milliseconds.

Shapes: B units, N examples, C classes, m features: the hidden states of one or more layers.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.prompt import Adapter, PromptContents, SoftPromptArtifact
from post_dist.config.schema import RunConfig, Tune
from post_dist.config.stages import WarmStart
from post_dist.conflicts import Conflict
from post_dist.data.order import shuffled_rows
from post_dist.data.template import Batch
from post_dist.models.batch_inference import InferenceRun, outputs_at_answers
from post_dist.models.facts import ModelFacts
from post_dist.models.own_texts import own_texts
from post_dist.models.tuning_task import AnswerStates, TuningTask
from post_dist.privacy.micro_batches import micro_batches
from post_dist.privacy.scoring import validation_task
from post_dist.runtime.distributed import World
from post_dist.runtime.optimizers import averaging_from, make_optimizer
from post_dist.runtime.stop import stop_requested, stopped
from post_dist.runtime.watchdog import phase

log = logging.getLogger(__name__)

_GRADIENT_BYTES = 1 << 26
"""Memory for the gradients of a step that are computed at the same time."""
_OWN_TEXTS = 128
"""Number of texts that give mean and scale if there is no public prompt."""
_OWN_BATCH = 16


@dataclass(frozen=True)
class HeadInputs:
    """What a head reads of the examples, in fp64.

    Attributes:
        features_Nm: features of length 1.
        scores_NC: class scores of the label words, to which the head adds its own.
        classes_N: the classes.
    """

    features_Nm: np.ndarray
    scores_NC: np.ndarray
    classes_N: np.ndarray


def head_inputs(task: TuningTask, sizes: Mapping[int, int], world: World) -> HeadInputs:
    """Run the model on all examples once.

    Micro-batches have fixed shapes, so that no example changes the features of another. There is no
    progress bar, because the number of examples is private.

    Args:
        task: the model, the examples, the prompt before them, and the head. The head standardizes
            the hidden states.
        sizes: number of examples in a micro-batch of each padded length.
        world: this process.

    Raises:
        Interrupted: the run was asked to stop.
    """
    head = task.need(LinearHead)
    count = len(task.examples)
    features_Nm = np.zeros((count, len(head.mean)))
    scores_NC = np.zeros((count, len(head.bias)))
    states = AnswerStates(task)
    for micro_batch in micro_batches(task, range(count), sizes, world.device):
        # This tells the watchdog that the run is alive, but not how many batches there are.
        phase("reading the examples")
        hidden_Bm, scores_BC = states(micro_batch.batch)
        for place, example in enumerate(micro_batch.examples):
            # One example at a time, so that rounding does not depend on its place.
            features_Nm[example] = head.features(hidden_Bm[place].clone()).cpu().numpy()
            scores_NC[example] = scores_BC[place].double().cpu().numpy()
        if stop_requested(world):
            raise stopped("the next start reads the examples again")
    return HeadInputs(features_Nm, scores_NC, task.targets.numpy())


def head_on_own_texts(task: TuningTask) -> LinearHead:
    """Make an untrained head behind a prompt that no public text came with.

    Its mean and scale come from texts that the student writes, so they cost no privacy.

    Args:
        task: the student and the prompt.
    """
    model = task.model
    reader = task.reader
    count = len(model.layers)
    layers = range(count)[-WarmStart.model_fields["head_layers"].default :]
    world = World(0, 1, 0, "none", model.model.device)
    hidden_Nm = outputs_at_answers(
        model,
        reader.encode(own_texts(model, reader, _OWN_TEXTS)),
        reader.template,
        task.start_nd,
        lambda hidden_Bm: hidden_Bm,
        InferenceRun(_OWN_BATCH, world, "texts of the student", show=False),
        layers=layers,
    )
    return LinearHead.untrained(hidden_Nm, reader.num_classes)


class TunedHead:
    """The weight [C, m] and the bias [C] of a head.

    Args:
        task: the model, the training examples, and the prompt and head to start from.
        config: the run file.
        sizes: number of examples in a micro-batch of each padded length.
        world: this process, alone.
    """

    def __init__(
        self, task: TuningTask, config: RunConfig, sizes: Mapping[int, int], world: World
    ) -> None:
        self._task = task
        self._head = task.need(LinearHead)
        self._config = config
        self._sizes = sizes
        self._world = world
        self._inputs = head_inputs(task, sizes, world)
        # Every example is computed at the same place in memory, because kernels may treat the ends
        # of an array by its address.
        self._feature_m = np.zeros(len(self._head.mean))

    @staticmethod
    def start(
        task: TuningTask, config: RunConfig, public: SoftPromptArtifact | None
    ) -> Adapter | None:
        """Return the head of the public prompt, or an untrained head behind another prompt."""
        if public is not None:
            return public.adapter
        log.info("tune: the student writes texts that say how large its hidden states are")
        return head_on_own_texts(task)

    @staticmethod
    def conflicts(section: Tune, model: ModelFacts) -> list[Conflict]:
        """Return none: every model has hidden states."""
        return []

    @staticmethod
    def start_conflicts(start: SoftPromptArtifact | None, model: ModelFacts) -> list[Conflict]:
        """Find a public prompt without a head, or a model that can do nothing without one."""
        if start is None and model.masked:
            return [
                Conflict(
                    "tune.adapter: head needs a public prompt, because a masked model writes no "
                    "texts that could stand for public ones",
                    "set tune.adapter: prompt, give inputs.public_prompt, or add the section "
                    "warm_start",
                )
            ]
        if start is not None and start.adapter is None:
            return [
                Conflict(
                    "inputs.public_prompt has no head to tune",
                    "let `post-dist warm-start` make it",
                )
            ]
        return []

    @staticmethod
    def contents(
        task: TuningTask, parameters: Sequence[torch.Tensor], statement: dict[str, Any] | None
    ) -> PromptContents:
        """Return the public prompt with the tuned head."""
        weight, bias = parameters
        head = task.need(LinearHead).with_values(weight, bias)
        return PromptContents(task.start_nd, task.reader.task, statement, head)

    @property
    def units(self) -> Sequence[Sequence[int]]:
        """The examples of each unit of privacy."""
        return self._task.units

    def parameters(self) -> list[torch.Tensor]:
        """Return the weight and bias of the head to start from."""
        return [self._head.weight.float().clone(), self._head.bias.float().clone()]

    def optimizer(
        self, parameters: list[torch.Tensor], learning_rate: float, steps: int
    ) -> torch.optim.Optimizer:
        """Create the optimizer of the run file."""
        group = {"params": list(parameters), "lr": learning_rate, **averaging_from(steps)}
        return make_optimizer(self._config.tune.optimizer, [group])

    @staticmethod
    def results(
        task: TuningTask,
        section: Tune,
    ) -> Callable[[Batch, torch.Tensor], list[torch.Tensor]]:
        """Return the hidden states and the scores of a micro-batch, which the head reads."""
        states = AnswerStates(task)
        return lambda batch, targets: list(states(batch))

    def gradients(
        self, parameters: Sequence[torch.Tensor], units: Sequence[int]
    ) -> Iterator[list[torch.Tensor]]:
        """Yield the gradients of a step's units, some of them at a time.

        The gradient of the cross-entropy is the outer product of the error of the probabilities and
        the feature.
        """
        weight_Cm, bias_C = (parameter.detach().double().numpy() for parameter in parameters)
        at_once = max(1, _GRADIENT_BYTES // weight_Cm.nbytes)
        for start in range(0, len(units), at_once):
            chosen = units[start : start + at_once]
            weight_BCm = np.zeros((len(chosen), *weight_Cm.shape))
            bias_BC = np.zeros((len(chosen), len(bias_C)))
            for row, unit in enumerate(chosen):
                for example in self.units[unit]:
                    error_C = self._probabilities(self._inputs, example, weight_Cm, bias_C)
                    error_C[self._inputs.classes_N[example]] -= 1
                    weight_BCm[row] += np.outer(error_C, self._feature_m)
                    bias_BC[row] += error_C
            yield [torch.from_numpy(weight_BCm), torch.from_numpy(bias_BC)]

    def count_right(self, parameters: Sequence[torch.Tensor]) -> int:
        """Count the validation examples that the head classifies correctly.

        Raises:
            InputError: the data have no validation examples.
            Interrupted: the run was asked to stop.
        """
        weight_Cm, bias_C = (parameter.detach().double().numpy() for parameter in parameters)
        inputs = self._validation
        right = 0
        for example, label in enumerate(inputs.classes_N):
            p_C = self._probabilities(inputs, example, weight_Cm, bias_C)
            right += int(p_C.argmax() == label)
        return right

    def loss(self, parameters: Sequence[torch.Tensor], step: int) -> torch.Tensor:
        """Return the mean loss of a batch of tuning without privacy."""
        count = len(self._task.examples)
        size = min(self._config.tune.batch_size, count)
        chosen = shuffled_rows(step * size, size, count, self._config.seed)
        weight_Cm, bias_C = parameters
        scores_BC = self._scores_NC[chosen] + self._features_Nm[chosen] @ weight_Cm.T + bias_C
        return functional.cross_entropy(scores_BC, self._task.targets[chosen])

    @cached_property
    def _features_Nm(self) -> torch.Tensor:
        """The features in fp32."""
        return torch.from_numpy(self._inputs.features_Nm).float()

    @cached_property
    def _scores_NC(self) -> torch.Tensor:
        """The scores of the label words in fp32."""
        return torch.from_numpy(self._inputs.scores_NC).float()

    @cached_property
    def _validation(self) -> HeadInputs:
        validation = validation_task(self._task, self._config.need_task("private_task"))
        return head_inputs(validation, self._sizes, self._world)

    def _probabilities(
        self, inputs: HeadInputs, example: int, weight_Cm: np.ndarray, bias_C: np.ndarray
    ) -> np.ndarray:
        """Return an example's class probabilities [C], and keep its feature."""
        self._feature_m[:] = inputs.features_Nm[example]
        scores_C = inputs.scores_NC[example] + weight_Cm @ self._feature_m + bias_C
        p_C: np.ndarray = np.exp(scores_C - scores_C.max())
        p_C /= p_C.sum()
        return p_C
