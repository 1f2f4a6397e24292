"""Compute exact per-example gradients in one backward pass, without hooks.

No operation of a language model mixes examples. Each example gets its own copy of the prompt, in
one leaf tensor [B, n, d]. The gradient of the summed loss with respect to this leaf then holds the
gradient of each example's own loss.

In a causal model the prompt's keys and values do not depend on the example. They can be computed
once a step. Each example's gradient is then taken with respect to its own copy of them. One batched
vector-Jacobian product carries the gradients of all examples back to the prompt. None of its
operations is repeated for each example.

Shapes: B examples, n prompt tokens, d width, C classes, R tokens of a response.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from post_dist.data.template import Batch
from post_dist.data.verbalizer import Verbalizer
from post_dist.models.classifier import PromptInput
from post_dist.models.language_model import LanguageModel
from post_dist.models.tuning_task import TuningTask, example_losses
from post_dist.privacy.micro_batches import micro_batches

# Sharing the prefix is slower for shorter prompts (measured on a CPU, texts of 40 tokens).
_SHARE_FROM_TOKENS = 20

Gradients = Callable[[Batch, torch.Tensor], list[torch.Tensor]]
"""Maps examples and their targets to the gradients [B, ...] of each parameter."""

# Users whose sums of gradients are in memory at the same time.
_USERS_AT_ONCE = 64


class ExampleGradients:
    """Computes gradients with respect to each example's own copy of the tuned parameters.

    Args:
        model: frozen, in evaluation mode.
        verbalizer: maps logits to class scores; not used for responses.
        parameters: the prompt [n, d], and the bias parameters [C] if they are tuned.
        share_prefix: compute the prompt's keys and values once; only for causal models.
    """

    def __init__(
        self,
        model: LanguageModel,
        verbalizer: Verbalizer,
        parameters: Sequence[torch.Tensor],
        *,
        share_prefix: bool,
    ) -> None:
        self._model = model
        self._verbalizer = verbalizer
        self._bias = parameters[1].detach() if len(parameters) > 1 else None
        self._prompt_nd = parameters[0].detach()
        self._prefix: tuple[torch.Tensor, ...] | None = None
        if share_prefix:
            self._prefix, self._product = model.prefix_with_product(self._prompt_nd)

    def __call__(self, batch: Batch, targets: torch.Tensor) -> list[torch.Tensor]:
        """Return the per-example gradients [B, ...] of each parameter, in the parameter's dtype.

        Args:
            batch: the examples.
            targets: their classes [B], or the tokens of their responses [B, R].
        """
        # Each example gets leaf tensors of its own. Its gradient is taken with respect to them.
        copies = self._prompt_copies(len(targets))
        leaves = list(copies)
        bias_BC = None
        if self._bias is not None:
            bias_BC = self._bias.expand(len(targets), -1).clone().requires_grad_(True)
            leaves.append(bias_BC)
        # The model takes the prompt as embeddings, or as precomputed keys and values.
        if self._prefix is None:
            prompt = PromptInput(prompt=copies[0])
        else:
            prompt = PromptInput(prefix=copies)
        losses_B = example_losses(self._model, self._verbalizer, batch, targets, prompt, bias_BC)
        # The SUM of losses: a mean would divide each gradient by the batch size before clipping.
        gradients = torch.autograd.grad(losses_B.sum(), leaves)
        gradients_of_copies = gradients[: len(copies)]
        gradients_of_biases = gradients[len(copies) :]
        # The chain rule carries gradients of the keys and values back to the prompt.
        if self._prefix is not None:
            gradients_of_copies = self._product(
                tuple(part.unsqueeze(1) for part in gradients_of_copies)
            )
        return [*gradients_of_copies, *gradients_of_biases]

    def _prompt_copies(self, count: int) -> list[torch.Tensor]:
        """Return leaf tensors that hold one copy of the prompt, or of its prefix, per example."""
        sources = [self._prompt_nd[None]] if self._prefix is None else self._prefix
        copies = []
        for source in sources:
            copy = source.detach().expand(count, *source.shape[1:])
            copies.append(copy.requires_grad_(True))
        return copies


def task_gradients(task: TuningTask, parameters: Sequence[torch.Tensor]) -> ExampleGradients:
    """Return the faster kind of `ExampleGradients` for a tuning task."""
    share = sharing_is_faster(task.model, len(parameters[0]))
    return ExampleGradients(task.model, task.reader.verbalizer, parameters, share_prefix=share)


def unit_gradients(
    task: TuningTask,
    parameters: Sequence[torch.Tensor],
    units: Sequence[int],
    sizes: Mapping[int, int],
    device: torch.device,
    gradients_of_step: Callable[[], Gradients] | None = None,
) -> Iterator[list[torch.Tensor]]:
    """Yield the gradients of a step's units, some of them at a time.

    Args:
        task: holds the model and the examples.
        parameters: current values of the parameters.
        units: numbers of the units of the step: examples, or users; may be empty.
        sizes: number of examples in a micro-batch of each padded length.
        device: the model's device.
        gradients_of_step: returns what computes the gradients of a micro-batch; None for those of
            the prompt, and of the biases if they are tuned.

    Yields:
        The gradients [B, ...] of each parameter for B units.
    """
    # A step without examples needs no prefix.
    if not units:
        return
    # The prefix of a prompt is computed once for the whole step.
    gradients = gradients_of_step() if gradients_of_step else task_gradients(task, parameters)
    if not task.users:
        for _, found in _micro_gradients(task, gradients, units, sizes, device):
            yield found
        return
    for start in range(0, len(units), _USERS_AT_ONCE):
        users = units[start : start + _USERS_AT_ONCE]
        examples = [example for user in users for example in task.units[user]]
        totals = []
        for parameter in parameters:
            totals.append(parameter.new_zeros(len(users), *parameter.shape, dtype=torch.float64))
        row_of = {user: row for row, user in enumerate(users)}
        # One example after the other, in the order of the user's own examples, so that the rounding
        # of a user's sum depends on no other user.
        for chosen, found in _micro_gradients(task, gradients, examples, sizes, device):
            for place, example in enumerate(chosen):
                for total, part in zip(totals, found, strict=True):
                    total[row_of[task.users[example]]] += part[place]
        yield totals


def _micro_gradients(
    task: TuningTask,
    gradients: Gradients,
    examples: Sequence[int],
    sizes: Mapping[int, int],
    device: torch.device,
) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """Yield examples and their gradients, one micro-batch of a fixed shape at a time.

    The gradients of the copies that fill up a micro-batch are left out.
    """
    for micro_batch in micro_batches(task, examples, sizes, device):
        found = gradients(micro_batch.batch, micro_batch.targets)
        yield micro_batch.examples, [part[: micro_batch.counted] for part in found]


def sharing_is_faster(model: LanguageModel, num_virtual_tokens: int) -> bool:
    """Return whether `share_prefix` makes a step faster: on a CPU, for prompts that are not short.

    On an H200 it slowed a step down: 2.9 times in bf16, 1.08 times in fp32. That was with a product
    that repeated operations for each example. This one was not measured on a GPU yet.
    """
    on_cpu = model.model.device.type == "cpu"
    long_enough = num_virtual_tokens >= _SHARE_FROM_TOKENS
    if not (on_cpu and long_enough) or _writes_tables(model):
        return False
    return model.keeps_prefix and model.differentiates_prefix


def _writes_tables(model: LanguageModel) -> bool:
    """Return whether a model writes its rotary frequencies anew in each pass.

    PyTorch refuses that inside a vector-Jacobian product.
    """
    kinds = [getattr(module, "rope_type", "") for module in model.modules()]
    return any("longrope" in str(kind) for kind in kinds)
