"""Micro-batches of fixed shapes, on which the privacy of a step and of a score rests.

What kernels round depends on the shapes that they are given. The length of a micro-batch and its
number of examples are fixed by each example's own length. So an example's gradient, and its class
scores, are functions of that example alone, bit for bit, whichever other examples are in the step.
Otherwise one more example would also change the gradients of others by more than the clipping norm
allows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from post_dist.data.template import Batch
from post_dist.models.tuning_task import TuningTask

LENGTH_STEP = 16
"""Lengths are rounded up to a multiple of this, so that a step needs few different shapes."""


@dataclass(frozen=True)
class MicroBatch:
    """Some examples of a step, filled up to a fixed number and padded to a fixed length.

    Attributes:
        counted: number of examples that count. The others are copies of the last one.
        batch: the examples and the copies.
        targets: the class or the response of each, copies included.
    """

    counted: int
    batch: Batch
    targets: torch.Tensor


def micro_batches(
    task: TuningTask, examples: Sequence[int], longest_size: int, device: torch.device
) -> Iterator[MicroBatch]:
    """Cut examples into micro-batches whose shapes depend on each example's own length alone.

    All micro-batches have about as many tokens as `longest_size` examples of the greatest length.

    Args:
        task: holds the examples.
        examples: numbers of the examples of a step.
        longest_size: number of examples in a micro-batch of the longest examples.
        device: where the micro-batches go.
    """
    longest = padded_length(task)
    for length, group in sorted(_groups_by_length(task, examples).items()):
        # Shorter examples come in larger micro-batches: about as many tokens, and the same memory.
        size = longest_size * longest // length
        for start in range(0, len(group), size):
            chosen = group[start : start + size]
            # Copies fill up the last micro-batch, so that its shape is the same whatever its size.
            copies = chosen[-1:] * (size - len(chosen))
            filled = chosen + copies
            batch = task.reader.collate([task.examples[example] for example in filled], length)
            yield MicroBatch(len(chosen), batch.to(device), task.targets[filled].to(device))


def padded_length(task: TuningTask) -> int:
    """Return the number of tokens of the longest micro-batch.

    An example of a masked model always has padding. Where all examples of a call are without any,
    transformers drops the attention mask. Other kernels run then, and what they round would depend
    on the lengths of the other examples.
    """
    return task.reader.longest + task.model.masked


def _groups_by_length(task: TuningTask, examples: Sequence[int]) -> dict[int, list[int]]:
    """Group examples by the length that they are padded to: their own, rounded up."""
    longest = padded_length(task)
    groups: dict[int, list[int]] = {}
    for example in examples:
        needed = len(task.examples[example].token_ids) + task.model.masked
        # Round up without floating-point numbers.
        rounded = -(-needed // LENGTH_STEP) * LENGTH_STEP
        groups.setdefault(min(rounded, longest), []).append(example)
    return groups
