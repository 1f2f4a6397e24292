"""Batches of tuning without privacy."""

import torch

from post_dist.config.schema import RunConfig
from post_dist.data.order import rows_of_like_length
from post_dist.data.template import Batch
from post_dist.models.tuning_task import TuningTask


def batch_of_like_length(
    task: TuningTask, config: RunConfig, step: int, device: torch.device
) -> tuple[Batch, torch.Tensor]:
    """Return the examples of a step and their targets.

    Such a batch holds examples of similar length. Private batches are drawn at random instead.

    Args:
        task: holds the examples.
        config: gives the batch size and the seed.
        step: number of the step.
        device: device of the batch.
    """
    lengths = [len(example.token_ids) for example in task.examples]
    chosen = rows_of_like_length(step, config.tune.batch_size, lengths, config.seed)
    batch = task.reader.collate([task.examples[index] for index in chosen])
    return batch.to(device), task.targets[chosen].to(device)
