"""Measure how fast this machine tunes privately. No private data is read.

Shapes: N examples, R tokens of a response.
"""

import time
from dataclasses import dataclass, replace

import torch

from post_dist.artifacts.head import LinearHead
from post_dist.config.schema import RunConfig
from post_dist.data.template import Encoded
from post_dist.models.tuning_task import TuningTask
from post_dist.privacy.batch_sizes import independent_sizes
from post_dist.privacy.micro_batches import padded_length, size_of_longest
from post_dist.privacy.tuned_part import tuned_kind
from post_dist.runtime.distributed import World
from post_dist.runtime.stop import leave_if_requested
from post_dist.stages.tune.stage import bound_task
from post_dist.stages.tune.tuned_model import TunedModel

_SECONDS = 5.0
"""Shortest time over which gradients are timed."""
_BESIDE_GRADIENTS = 0.03
"""Seconds of a step for its noise, its row in the ledger and its state, on a local disk. All of a
step of a head took 0.022 s on two cores of an AMD EPYC."""


@dataclass(frozen=True)
class TuningSpeed:
    """Speed of private tuning.

    Attributes:
        pass_seconds: time of one micro-batch of examples of full length.
        pass_examples: number of its examples. Shorter examples come in larger micro-batches that
            take about as long.
        lengths: number of padded lengths. The last micro-batch of each may be filled with copies.
        reading_seconds: time to read one example before the first step. A head reads all of them.
    """

    pass_seconds: float
    pass_examples: int
    lengths: int
    reading_seconds: float

    @property
    def gradients_per_second(self) -> float:
        """Gradients of single examples of full length."""
        return self.pass_examples / self.pass_seconds

    def step_seconds(self, batch_size: float) -> float:
        """Return about the longest time that a step takes, whatever the lengths of its examples."""
        passes = batch_size / self.pass_examples + self.lengths
        return passes * self.pass_seconds + _BESIDE_GRADIENTS


def measure_speed(config: RunConfig, model: TunedModel, world: World) -> TuningSpeed:
    """Time the gradients of random tokens, in the micro-batches of a private run.

    Args:
        config: the run file, with the section `private_task`. Its data is not read.
        model: the model.
        world: this process, alone.

    Raises:
        InputError: the model cannot be tuned privately.
        Interrupted: the process was asked to stop.
    """
    private_task = config.need_task("private_task")
    task = _with_random_examples(bound_task(private_task, config, model, world), config)
    # The run will use these sizes, and a machine may allow smaller ones than the run file asks for.
    sizes = independent_sizes(config.tune, task)
    count = len(task.examples)
    start = time.monotonic()
    # The steps and the batch size are not chosen yet, so nothing is kept from step to step that
    # only some plans would keep.
    privacy = config.privacy.model_copy(update={"enabled": False})
    undecided = config.model_copy(update={"privacy": privacy})
    part = tuned_kind(config.tune)(task, undecided, sizes, world)
    reading_seconds = (time.monotonic() - start) / count
    parameters = part.parameters()

    # The sizes were tried with the same passes, so nothing is left to warm up.
    rounds = 0
    start = time.monotonic()
    while time.monotonic() - start < _SECONDS:
        leave_if_requested("nothing was tuned yet")
        for gradients in part.gradients(parameters, range(count)):
            # The sum waits for the device.
            float(gradients[0].sum())
        rounds += 1
    example_seconds = (time.monotonic() - start) / (rounds * count)

    # A head has read its examples, and its gradients need no passes.
    if isinstance(task.adapter, LinearHead):
        return TuningSpeed(example_seconds, 1, 0, reading_seconds)
    pass_examples = sizes[padded_length(task)]
    return TuningSpeed(example_seconds * pass_examples, pass_examples, len(sizes), 0.0)


def _with_random_examples(task: TuningTask, config: RunConfig) -> TuningTask:
    """Give a task random examples of full length: those of two passes."""
    count = 2 * size_of_longest(config.tune, task)
    reader = task.reader
    generator = torch.Generator().manual_seed(0)
    shape = (count, reader.longest)
    rows = torch.randint(task.model.vocabulary_size, shape, generator=generator).tolist()
    # The response is at the end of the text.
    end = reader.longest - reader.task.max_response_length
    examples = [Encoded(tokens, end - 1, tuple(tokens[end:])) for tokens in rows]
    if reader.generates:
        targets = reader.responses(examples)
    else:
        targets = torch.randint(reader.num_classes, (count,), generator=generator)
    return replace(task, examples=examples, targets=targets)
