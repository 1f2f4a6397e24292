"""The score of a trial in a private search: the number of correct validation examples.

The count is private. The search adds noise before it uses the count.

Shapes: B examples, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from post_dist.config.sources import Task
from post_dist.data.tasks import load_examples
from post_dist.data.template import Batch
from post_dist.models.classifier import BIAS_SCALE
from post_dist.models.tuning_task import TuningTask
from post_dist.privacy.micro_batches import micro_batches
from post_dist.runtime.distributed import World
from post_dist.runtime.stop import stop_requested, stopped
from post_dist.runtime.watchdog import phase


def validation_task(task: TuningTask, section: Task) -> TuningTask:
    """Return a tuning task with the validation examples in place of the training examples.

    Raises:
        InputError: no example falls into the validation split.
    """
    loaded = load_examples(section, "validation", "private_task")
    examples = task.reader.encode(loaded.texts)
    return replace(task, examples=examples, targets=torch.tensor(loaded.classes), users=())


@torch.no_grad()
def answer_logits(task: TuningTask, batch: Batch, prompt_nd: torch.Tensor) -> torch.Tensor:
    """Return the logits [B, V] of a micro-batch, which its class scores are computed from."""
    # Run the whole head as `evaluate` does: a head of a few tokens may round differently.
    logits_BV: torch.Tensor = task.model(
        batch.input_ids, batch.attention_mask, prompt_nd, batch.answer
    )
    return logits_BV


@torch.no_grad()
def class_scores(
    task: TuningTask, batch: Batch, parameters: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return the class scores [B, C] of a micro-batch, with the biases if they are tuned."""
    scores_BC = task.reader.scores(answer_logits(task, batch, parameters[0]))
    if len(parameters) > 1:
        scores_BC = scores_BC + BIAS_SCALE * parameters[1]
    return scores_BC


@torch.no_grad()
def count_right(
    task: TuningTask, parameters: Sequence[torch.Tensor], sizes: Mapping[int, int], world: World
) -> int:
    """Count the examples that the tuned parameters classify correctly.

    Micro-batches have fixed shapes, so one more example changes the count by at most one. There is
    no progress bar, because the numbers of examples and of trials are private.

    Args:
        task: holds the model and the examples to classify.
        parameters: the prompt, and the bias parameters if they are tuned.
        sizes: number of examples in a micro-batch of each padded length.
        world: this process.

    Raises:
        Interrupted: the run was asked to stop.
    """
    right = 0
    for micro_batch in micro_batches(task, range(len(task.examples)), sizes, world.device):
        # This tells the watchdog that the run is alive, but not how many batches there are.
        phase("counting right answers")
        scores_BC = class_scores(task, micro_batch.batch, parameters)
        # Copies that fill up a micro-batch are cut off before the count.
        matches_B = scores_BC.argmax(dim=1) == micro_batch.targets
        right += int(matches_B[: micro_batch.counted].sum())
        if stop_requested(world):
            raise stopped("the next start counts right answers again")
    return right
