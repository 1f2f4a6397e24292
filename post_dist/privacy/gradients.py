"""Exact gradients of each example's own loss, in one backward pass and without hooks.

No operation of a language model mixes rows, so with a copy of the prompt for each row, a leaf [B, n, d], the gradient of the
sum of losses with respect to the leaf is the gradient of each row's loss. In a causal model the prompt's keys and values are the
same for all rows: they are computed once a step, each row's gradient is taken with respect to its own expanded copy of them, and
one batched vector-Jacobian product carries all rows' gradients back to the prompt.

Shapes: B rows, n prompt tokens, d width, C classes.
"""

from collections.abc import Sequence

import torch

from post_dist.data.template import Batch
from post_dist.data.verbalizer import Verbalizer
from post_dist.errors import InputError
from post_dist.models.classifier import class_losses
from post_dist.models.generation import response_losses
from post_dist.models.language_model import LanguageModel

_SHARE_FROM_TOKENS = 20
"""Shorter prompts cost more as a shared prefix than as part of each row (measured on a CPU, texts of 40 tokens)."""
_ALONE = 1e-4


class ExampleGradients:
    """Gradients with respect to each example's own copy of the tuned parameters, at their present values.

    Args:
        model: frozen, in evaluation mode.
        verbalizer: from logits to class scores; of no use where responses are wanted.
        parameters: the prompt [n, d], and the bias parameters [C] if they are tuned.
        share_prefix: compute the prompt's keys and values once; for causal models.
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
        self._prompt_nd = parameters[0].detach().clone().requires_grad_(True)
        self._prefix = model.prefix_of(self._prompt_nd) if share_prefix else None

    def __call__(self, batch: Batch, wanted: torch.Tensor) -> list[torch.Tensor]:
        """For each parameter [B, ...], in the parameter's own type whatever the model's is.

        Args:
            batch: the rows.
            wanted: their classes [B], or the tokens of their responses [B, R].
        """
        rows = len(wanted)
        biases = (
            [] if self._bias is None else [self._bias.expand(rows, -1).clone().requires_grad_(True)]
        )
        sources = [self._prompt_nd.detach()[None]] if self._prefix is None else self._prefix
        copies = [
            source.detach().expand(rows, *source.shape[1:]).requires_grad_(True)
            for source in sources
        ]
        place = {"prompt": copies[0]} if self._prefix is None else {"prefix": copies}
        if wanted.dim() == 2:
            losses_B = response_losses(self._model, batch, wanted, **place)  # type: ignore[arg-type]
        else:
            losses_B = class_losses(
                self._model,
                self._verbalizer,
                batch,
                wanted,
                bias=biases[0] if biases else None,
                **place,
            )  # type: ignore[arg-type]
        gradients = torch.autograd.grad(losses_B.sum(), [*copies, *biases])
        of_copies, of_biases = gradients[: len(copies)], gradients[len(copies) :]
        if self._prefix is not None:
            cotangents = [part.unsqueeze(1) for part in of_copies]
            of_copies = torch.autograd.grad(
                self._prefix, self._prompt_nd, cotangents, is_grads_batched=True, retain_graph=True
            )
        return [*of_copies, *of_biases]


def sharing_is_faster(model: LanguageModel, num_virtual_tokens: int) -> bool:
    """Whether `share_prefix` makes a step faster: on a CPU, for prompts that are not short.

    On an H200 a step of 128 rows behind 100 tokens took 2.9 times as long with it in bf16, and 1.08 times in fp32.
    """
    return (
        not model.masked
        and model.model.device.type == "cpu"
        and num_virtual_tokens >= _SHARE_FROM_TOKENS
    )


def check_rows_are_alone(
    gradients: ExampleGradients, model: LanguageModel, wanted: torch.Tensor, length: int
) -> None:
    """Check on random tokens that a row's gradient does not depend on the other rows, which all of the privacy rests on.

    Args:
        gradients: to be checked.
        model: whose they are.
        wanted: classes [B] or responses [B, R] for the rows, two or more.
        length: tokens of a row.

    Raises:
        InputError: it does, as in a mixture of experts whose tokens share a capacity.
    """
    device = model.model.device
    generator = torch.Generator(device).manual_seed(0)
    first, second = torch.randint(
        model.vocabulary_size, (2, len(wanted), length), generator=generator, device=device
    )
    second[0] = first[0]
    answer_B = torch.full(
        (len(wanted),), length - (1 if wanted.dim() == 1 else wanted.shape[1]), device=device
    )
    one, other = (
        gradients(Batch(ids, torch.ones_like(ids), answer_B), wanted.to(device))[0][0]
        for ids in (first, second)
    )
    if (one - other).norm() > _ALONE * one.norm():
        raise InputError(
            f"{type(model.model).__name__} lets rows of a batch change each other's gradients, so no clip can bound what one row does",
            "use a dense model",
        )
