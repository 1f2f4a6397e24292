"""A check before private tuning: the examples of a batch must not change each other's gradients.

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

# Largest relative change of a gradient that rounding explains when other examples change.
_TOLERANCE = 1e-4


def check_model(section: Tune, task: TuningTask) -> None:
    """Check on random tokens that private tuning can bound what one example contributes.

    Raises:
        InputError: the model lets the examples of a batch change each other's gradients.
    """
    # Short examples share a micro-batch even where micro_batch_size_per_gpu is 1.
    count = max(2, section.micro_batch_size_per_gpu)
    # The shapes are those of the shortest micro-batch, or of all of them where text is generated.
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
    """Compute one example's gradient beside two different sets of other examples, and compare.

    Args:
        gradients: computes the gradients to check.
        model: the model that they belong to.
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
    # No token is padding: the answer is at the end, or R tokens before it.
    response_length = 1 if targets.dim() == 1 else targets.shape[1]
    answer_B = torch.full((count,), length - response_length, device=device)
    targets = targets.to(device)
    one = gradients(Batch(first, torch.ones_like(first), answer_B), targets)[0][0]
    other = gradients(Batch(second, torch.ones_like(second), answer_B), targets)[0][0]
    # The comparison is with the gradient of the prompt, the first of the parameters.
    if (one - other).norm() > _TOLERANCE * one.norm():
        raise InputError(
            f"{type(model.model).__name__} lets the examples of a batch change each other's "
            "gradients, so gradient clipping cannot bound what one example contributes",
            "use a dense model",
        )
