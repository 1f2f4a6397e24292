"""Micro-batches of fixed shapes, which the privacy of steps and scores depends on.

Rounding in a kernel depends on the shapes of its inputs. Here an example's own length fixes both
the length of its micro-batch and the number of examples in it. Otherwise adding one example could
change the gradients of other examples. The clipping norm would then not bound the change of the
sum. `batch_sizes` checks that also the place in a micro-batch changes nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from post_dist.artifacts.head import LinearHead
from post_dist.config.schema import Tune
from post_dist.data.template import Batch
from post_dist.models.tuning_task import TuningTask

_WITHOUT_GRADIENTS = 8
"""Examples in a pass without gradients, for each example in one with gradients."""

LENGTH_STEP = 16
"""Lengths are rounded up to a multiple of this, so that a step uses few different shapes."""


@dataclass(frozen=True)
class MicroBatch:
    """Examples of a step, filled up to a fixed number and padded to a fixed length.

    Attributes:
        examples: indices of the real examples. The rest are copies of the last one.
        batch: the examples and the copies.
        targets: the classes or responses of the examples and the copies.
    """

    examples: list[int]
    batch: Batch
    targets: torch.Tensor

    @property
    def counted(self) -> int:
        """Number of real examples."""
        return len(self.examples)


def micro_batches(
    task: TuningTask, examples: Sequence[int], sizes: Mapping[int, int], device: torch.device
) -> Iterator[MicroBatch]:
    """Split examples into micro-batches whose shapes depend only on each example's own length.

    Args:
        task: holds the examples.
        examples: indices of the examples of a step.
        sizes: number of examples in a micro-batch of each padded length.
        device: device of the micro-batches.
    """
    for length, group in sorted(_groups_by_length(task, examples).items()):
        size = sizes[length]
        for start in range(0, len(group), size):
            chosen = group[start : start + size]
            # Copies fill up the last micro-batch, so that it has the same shape as the others.
            copies = chosen[-1:] * (size - len(chosen))
            filled = chosen + copies
            batch = task.reader.collate([task.examples[example] for example in filled], length)
            yield MicroBatch(chosen, batch.to(device), task.targets[filled].to(device))


def size_of_longest(section: Tune, task: TuningTask) -> int:
    """Return how many of the longest examples a pass holds.

    A head needs no gradient of the model. Its passes keep the activations of one layer at a time.
    """
    factor = _WITHOUT_GRADIENTS if isinstance(task.adapter, LinearHead) else 1
    return factor * section.micro_batch_size_per_gpu


def planned_sizes(task: TuningTask, longest_size: int) -> dict[int, int]:
    """Return the number of examples in a micro-batch of each padded length.

    Shorter examples come in larger micro-batches, so that all need about the same memory.

    Args:
        task: its template limits the length of an example.
        longest_size: number of examples in a micro-batch of the longest examples.
    """
    longest = padded_length(task)
    lengths = [*range(LENGTH_STEP, longest, LENGTH_STEP), longest]
    return {length: longest_size * longest // length for length in lengths}


def padded_length(task: TuningTask) -> int:
    """Return the number of tokens of the longest micro-batch.

    Examples of a masked model always get at least one padding token. Without any padding in a
    batch, transformers drops the attention mask and runs other kernels. Rounding would then depend
    on the lengths of the other examples.
    """
    return task.reader.longest + task.model.masked


def _groups_by_length(task: TuningTask, examples: Sequence[int]) -> dict[int, list[int]]:
    """Group examples by their padded length: their own length, rounded up."""
    longest = padded_length(task)
    groups: dict[int, list[int]] = {}
    for example in examples:
        needed = len(task.examples[example].token_ids) + task.model.masked
        # Round up without floating-point numbers.
        rounded = -(-needed // LENGTH_STEP) * LENGTH_STEP
        groups.setdefault(min(rounded, longest), []).append(example)
    return groups
