"""Check before private tuning that the examples of a batch do not change each other's gradients.

Shapes: B examples, R tokens of a response.
"""

import torch

from post_dist.config.schema import Tune
from post_dist.data.template import Batch
from post_dist.errors import InputError
from post_dist.models.language_model import LanguageModel
from post_dist.models.tuning_task import TuningTask
from post_dist.privacy.gradients import ExampleGradients, task_gradients
from post_dist.privacy.micro_batches import LENGTH_STEP

# Largest relative change of a gradient that rounding can explain.
_TOLERANCE = 1e-4


def check_model(section: Tune, task: TuningTask) -> None:
    """Check with random tokens that private tuning can bound the contribution of one example.

    Raises:
        InputError: the model lets the examples of a batch change each other's gradients.
    """
    # Short examples share a micro-batch even where micro_batch_size_per_gpu is 1.
    count = max(2, section.micro_batch_size_per_gpu)
    # Classification uses the shape of the shortest micro-batch, generation the longest.
    if task.reader.generates:
        targets = torch.ones(count, task.targets.shape[1], dtype=torch.long)
        length = task.reader.longest
    else:
        targets = torch.arange(count) % task.reader.num_classes
        length = min(LENGTH_STEP, task.reader.longest)
    gradients = task_gradients(task, task.parameters(section))
    check_examples_are_independent(gradients, task.model, targets, length)


def check_examples_are_independent(
    gradients: ExampleGradients, model: LanguageModel, targets: torch.Tensor, length: int
) -> None:
    """Compare one example's gradients in two batches with different other examples.

    Args:
        gradients: computes the gradients to check.
        model: the model of these gradients.
        targets: classes [B] or responses [B, R] of two or more examples.
        length: number of tokens of each example.

    Raises:
        InputError: the gradients differ, as in a mixture of experts whose tokens share a capacity.
    """
    # Two batches of random tokens that have only their first example in common.
    device = model.model.device
    generator = torch.Generator(device).manual_seed(0)
    count = len(targets)
    shape = (2, count, length)
    first, second = torch.randint(model.vocabulary_size, shape, generator=generator, device=device)
    second[0] = first[0]
    # There is no padding, so the answer is at the last token, or R tokens before the end.
    response_length = 1 if targets.dim() == 1 else targets.shape[1]
    answer_B = torch.full((count,), length - response_length, device=device)
    targets = targets.to(device)
    one = gradients(Batch(first, torch.ones_like(first), answer_B), targets)[0][0]
    other = gradients(Batch(second, torch.ones_like(second), answer_B), targets)[0][0]
    # Both are gradients of the prompt, which is the first parameter.
    if (one - other).norm() > _TOLERANCE * one.norm():
        raise InputError(
            f"{type(model.model).__name__} lets the examples of a batch change each other's "
            "gradients, so gradient clipping cannot bound what one example contributes",
            "use a dense model",
        )
