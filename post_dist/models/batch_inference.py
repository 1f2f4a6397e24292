"""Run forward passes over many examples without gradients, divided among the ranks.

Shapes: N examples, B examples of a batch, V vocabulary, n prompt tokens, d width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from post_dist.data.template import Encoded, Template
from post_dist.models.language_model import LanguageModel
from post_dist.runtime.distributed import World
from post_dist.runtime.progress import progress
from post_dist.runtime.stop import stop_requested, stopped


@dataclass(frozen=True)
class InferenceRun:
    """Settings of one pass over many examples.

    Attributes:
        batch_size: maximum number of examples that each rank runs at once.
        world: the ranks that share the examples.
        label: name of the pass in progress bars and messages.
        show: whether to show progress. Counts in the log of a private run would look like its own.
    """

    batch_size: int
    world: World
    label: str
    show: bool = True


@torch.no_grad()
def map_batches(
    examples: list[Encoded],
    compute: Callable[[list[Encoded]], torch.Tensor],
    run: InferenceRun,
) -> torch.Tensor:
    """Compute a tensor for each example, batch by batch.

    All ranks call this function together. Each one runs the same number of batches, as a sharded
    model requires.

    Args:
        examples: the examples, in any order.
        compute: maps the examples of a batch to a tensor [B, ...].
        run: batch size, ranks and label.

    Returns:
        The results [N, ...] in the order of `examples`, on the CPU of every rank.

    Raises:
        Interrupted: a rank was asked to stop; nothing is saved.
    """
    # Batches of examples with similar length need little padding.
    by_length = sorted(range(len(examples)), key=lambda index: len(examples[index].token_ids))

    # A round is no larger than the examples need, so that a single one is no batch of copies.
    of_a_rank = -(-len(examples) // run.world.size)
    batch_size = min(run.batch_size, max(of_a_rank, 1))

    # Copies of the longest example fill up the last round. Their results are dropped below.
    examples_per_round = batch_size * run.world.size
    missing = -len(examples) % examples_per_round
    padded = by_length + by_length[-1:] * missing

    results: list[torch.Tensor] = []
    first = run.world.rank * batch_size
    rounds = len(padded) // examples_per_round
    with progress(run.label, rounds, show=run.show and run.world.is_main) as advance:
        for start in range(first, len(padded), examples_per_round):
            batch = [examples[index] for index in padded[start : start + batch_size]]
            results.append(run.world.concatenate(compute(batch)).cpu())
            advance("")
            if stop_requested(run.world):
                raise stopped(f"{run.label} is not saved: the next run repeats it")

    sorted_results = torch.cat(results)[: len(examples)]
    in_order = torch.empty_like(sorted_results)
    in_order[torch.tensor(by_length)] = sorted_results
    return in_order


def outputs_at_answers(
    model: LanguageModel,
    examples: list[Encoded],
    template: Template,
    prompt_nd: torch.Tensor | None,
    reduce: Callable[[torch.Tensor], torch.Tensor],
    run: InferenceRun,
    *,
    layers: Sequence[int] | None = None,
) -> torch.Tensor:
    """Run a model on examples, and reduce its outputs at the answer positions.

    Args:
        model: the frozen model.
        examples: the examples, encoded by `template`.
        template: pads the examples of a batch.
        prompt_nd: soft prompt [n, d] before each example; None for no prompt.
        reduce: function of the logits [B, V] at the answer positions, or of the hidden states
            [B, len(layers) d]. It returns a tensor [B, ...].
        run: batch size, ranks and label.
        layers: layers whose hidden states are reduced, counted from 0; None for the logits.

    Returns:
        The reduced outputs [N, ...], on the CPU of every rank.
    """
    share_prompt = prompt_nd is not None and model.shares_prompt

    def compute(chosen: list[Encoded]) -> torch.Tensor:
        batch = template.collate(chosen).to(run.world.device)
        outputs = model(
            batch.input_ids,
            batch.attention_mask,
            prompt_nd,
            batch.answer,
            share_prompt=share_prompt,
            layers=layers,
        )
        return reduce(outputs)

    return map_batches(examples, compute, run)
