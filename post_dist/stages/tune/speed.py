"""Measure how fast this machine tunes privately. No private data is read.

Shapes: N examples, R tokens of a response.
"""

import logging
import time
from dataclasses import dataclass, replace

import torch

from post_dist.config.schema import RunConfig
from post_dist.data.template import Encoded
from post_dist.models.tuning_task import TuningTask
from post_dist.privacy.batch_sizes import independent_sizes
from post_dist.privacy.micro_batches import size_of_longest
from post_dist.privacy.tuned_part import tuned_kind
from post_dist.runtime.distributed import World
from post_dist.runtime.stop import leave_if_requested
from post_dist.stages.tune.stage import bound_task
from post_dist.stages.tune.tuned_model import TunedModel

log = logging.getLogger(__name__)

_SECONDS = 5.0
"""Shortest time over which gradients are timed."""


@dataclass(frozen=True)
class TuningSpeed:
    """Speed of private tuning with examples of full length.

    Attributes:
        gradients_per_second: gradients of single examples, clipped and added up.
        reading_seconds: time to read one example before the first step. A head reads all of them.
    """

    gradients_per_second: float
    reading_seconds: float

    def gradients_in(self, seconds: float, examples: float) -> float:
        """Return how many gradients there is time for, after the examples were read."""
        return (seconds - examples * self.reading_seconds) * self.gradients_per_second


def measure_speed(config: RunConfig, model: TunedModel, world: World) -> TuningSpeed:
    """Time the gradients of random tokens, in the micro-batches of a private run.

    Examples of full length take longest, so a run on shorter texts is faster.

    Args:
        config: the run file, with the section `private_task`. Its data is not read.
        model: the model.
        world: this process, alone.

    Raises:
        InputError: the model cannot be tuned privately.
        Interrupted: the process was asked to stop.
    """
    task = _with_random_examples(
        bound_task(config.need_task("private_task"), config, model, world), config
    )
    # The run will use these sizes, and a machine may allow smaller ones than the run file asks for.
    sizes = independent_sizes(config.tune, task)
    count = len(task.examples)
    start = time.monotonic()
    part = tuned_kind(config.tune)(task, config, sizes, world)
    reading_seconds = (time.monotonic() - start) / count
    parameters = part.parameters()

    # The sizes were tried with the same passes, so nothing is left to warm up.
    passes = 0
    start = time.monotonic()
    while time.monotonic() - start < _SECONDS:
        leave_if_requested("nothing was tuned yet")
        for gradients in part.gradients(parameters, range(count)):
            # The sum waits for the device.
            float(gradients[0].sum())
        passes += 1
    seconds = time.monotonic() - start
    return TuningSpeed(passes * count / seconds, reading_seconds)


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
