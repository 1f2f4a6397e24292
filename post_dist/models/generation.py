"""A frozen causal model that writes a response behind each row, and how well it knows a response that is given.

Shapes: B rows, R tokens of a response, n prompt tokens, d width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn import functional

from post_dist.data.template import NO_TOKEN, Batch, Encoded, Template
from post_dist.models.batch_inference import map_in_batches
from post_dist.models.language_model import LanguageModel
from post_dist.runtime.distributed import World


def response_hidden(
    model: LanguageModel,
    batch: Batch,
    length: int,
    *,
    prompt: torch.Tensor | None = None,
    prefix: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """The last hidden states [B, R, d] that the first `length` tokens of each row's response are predicted from.

    Args:
        model: causal.
        batch: rows with their responses behind them.
        length: R; what stands past the end of a row is of no use.
        prompt: [n, d] or [B, n, d].
        prefix: in its place, the keys and values of a prompt.
    """
    hidden_BTd = model(batch.input_ids, batch.attention_mask, prompt, None, prefix)
    first_B = batch.answer + (0 if prompt is None else prompt.shape[-2])
    places_BR = first_B[:, None] + torch.arange(length, device=first_B.device)
    rows_B1 = torch.arange(len(first_B), device=first_B.device)[:, None]
    return hidden_BTd[rows_B1, places_BR.clamp(max=hidden_BTd.shape[1] - 1)]


def response_losses(
    model: LanguageModel,
    batch: Batch,
    responses_BR: torch.Tensor,
    *,
    prompt: torch.Tensor | None = None,
    prefix: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Cross-entropy [B], for each row the mean over the tokens of its response.

    The head runs on R places of every row, however long its response is: shapes, and so what is rounded, are the same whatever the
    other rows are, on which private tuning rests.
    """
    hidden_BRd = response_hidden(model, batch, responses_BR.shape[1], prompt=prompt, prefix=prefix)
    logits = model.head(hidden_BRd.flatten(0, 1))
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses_BR = functional.cross_entropy(
        wide, responses_BR.flatten(), ignore_index=NO_TOKEN, reduction="none"
    ).view_as(responses_BR)
    return losses_BR.sum(dim=1) / (responses_BR != NO_TOKEN).sum(dim=1)


def write_responses(
    model: LanguageModel,
    rows: list[Encoded],
    template: Template,
    prompt_nd: torch.Tensor | None,
    end: int,
    *,
    batch_size: int,
    world: World,
    label: str,
) -> torch.Tensor:
    """The tokens [N, R] that the model finds likeliest one by one behind each row, up to its end; NO_TOKEN from there on.

    Every token takes a forward of the whole row, so that all ranks of a sharded model run equally many.
    """
    share_prompt = prompt_nd is not None and model.shares_prompt

    def written(chosen: list[Encoded]) -> torch.Tensor:
        so_far, responses = list(chosen), [[] for _ in chosen]  # type: ignore[var-annotated]
        for _ in range(template.max_response_length):
            batch = template.collate(so_far).to(world.device)
            logits_BV = model(
                batch.input_ids,
                batch.attention_mask,
                prompt_nd,
                batch.answer,
                share_prompt=share_prompt,
            )
            for index, token in enumerate(logits_BV.argmax(dim=1).tolist()):
                if not responses[index] or responses[index][-1] != end:
                    responses[index].append(token)
                    so_far[index] = replace(
                        so_far[index],
                        token_ids=[*so_far[index].token_ids, token],
                        answer=so_far[index].answer + 1,
                    )
            if not world.any(any(response[-1] != end for response in responses)):
                break
        texts = [[token for token in response if token != end] for response in responses]
        padded = [text + [NO_TOKEN] * (template.max_response_length - len(text)) for text in texts]
        return torch.tensor(padded, device=world.device)

    return map_in_batches(rows, written, batch_size=batch_size, world=world, label=label)
