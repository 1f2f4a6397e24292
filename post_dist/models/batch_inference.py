"""What a model says of many rows, without gradients, shared among the ranks.

Shapes: N rows, B rows of a batch, V vocabulary, n prompt tokens, d width.
"""

from collections.abc import Callable

import torch

from post_dist.data.template import Encoded, Template
from post_dist.models.language_model import LanguageModel
from post_dist.runtime.distributed import World
from post_dist.runtime.progress import progress
from post_dist.runtime.stop import stop_requested, stopped


@torch.no_grad()
def map_in_batches(
    rows: list[Encoded],
    made_of: Callable[[list[Encoded]], torch.Tensor],
    *,
    batch_size: int,
    world: World,
    label: str,
) -> torch.Tensor:
    """For each row what `made_of` makes of its batch, [B, ...], in the order of the rows, on the CPU of every rank.

    Every rank runs equally many batches, as a sharded model needs; rows that fill up the last are dropped again.
    Rows are sorted by length, so that a batch pads little.
    """
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index].token_ids))
    share = batch_size * world.size
    padded = by_length + by_length[-1:] * (-len(rows) % share)
    results: list[torch.Tensor] = []
    with progress(label, len(padded) // share, show=world.is_main) as advance:
        for start in range(world.rank * batch_size, len(padded), share):
            made = made_of([rows[index] for index in padded[start : start + batch_size]])
            results.append(world.concatenate(made).cpu())
            advance("")
            if stop_requested(world):
                raise stopped(f"{label} is begun again next time")
    stacked = torch.cat(results)[: len(rows)]
    in_order = torch.empty_like(stacked)
    in_order[torch.tensor(by_length)] = stacked
    return in_order


def answers(
    language_model: LanguageModel,
    rows: list[Encoded],
    template: Template,
    prompt_nd: torch.Tensor | None,
    reduce: Callable[[torch.Tensor], torch.Tensor],
    *,
    batch_size: int,
    world: World,
    label: str,
    with_head: bool = True,
) -> torch.Tensor:
    """For each row what `reduce` makes of the logits [B, V] at its answer; see `map_in_batches`.

    Without the head, `reduce` is given the hidden states [B, d] that it would be run on.
    """
    share_prompt = prompt_nd is not None and language_model.shares_prompt

    def said(chosen: list[Encoded]) -> torch.Tensor:
        batch = template.collate(chosen).to(world.device)
        how = {"share_prompt": share_prompt, "with_head": with_head}
        return reduce(
            language_model(batch.input_ids, batch.attention_mask, prompt_nd, batch.answer, **how)
        )

    return map_in_batches(rows, said, batch_size=batch_size, world=world, label=label)
