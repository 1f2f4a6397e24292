"""The losses of one training step, for several prompts at once.

A model in ZeRO-3 shards gathers its weights for every forward. Prompts that are trained together
share one forward and one backward pass. The target's weights are then gathered less often.

Shapes: G prompts, B examples, R tokens of a response, V vocabulary, n prompt tokens, d width.
"""

from collections.abc import Sequence

import torch

from post_dist.models.generation import response_hidden
from post_dist.stages.transfer.objective import ModelPair, TransferObjective


def transfer_losses(
    models: ModelPair,
    objectives: Sequence[TransferObjective],
    prompts: Sequence[torch.Tensor],
    chosen: Sequence[list[int]],
) -> list[torch.Tensor]:
    """Compute the loss of each prompt on some of its examples.

    Args:
        models: student and target.
        objectives: the objective of each prompt. Either all of their tasks generate text, or none.
        prompts: the trained prompts [n, d], all of one length, on the target's device.
        chosen: for each prompt, the indices of its examples; equally many for all.

    Returns:
        The mean loss of each prompt, a scalar.
    """
    # Objectives on the vocabulary need logits of the target without a prompt, from stored hidden
    # states. They go through the head together with the prompted ones. A sharded head is then
    # gathered once.
    unprompted: list[torch.Tensor | None] = []
    for objective, indices in zip(objectives, chosen, strict=True):
        if objective.stores_hidden:
            stored = objective.select(indices, objective.outputs.target)
            unprompted.append(stored.to(prompts[0].device))
        else:
            unprompted.append(None)
    unprompted_hidden = [hidden for hidden in unprompted if hidden is not None]

    logits = _logits(models, objectives, prompts, chosen, unprompted_hidden)

    # Split the logits: first the prompted ones of all prompts in order, then the unprompted ones.
    prompted_counts = _prompted_counts(objectives, chosen)
    unprompted_counts = [len(hidden) for hidden in unprompted_hidden]
    parts = list(logits.split(prompted_counts + unprompted_counts))
    prompted_parts = parts[: len(objectives)]
    unprompted_parts = iter(parts[len(objectives) :])

    # Compute each loss from its own part of the logits.
    losses = []
    for index, objective in enumerate(objectives):
        target_BV = next(unprompted_parts) if objective.stores_hidden else None
        loss = objective.loss(chosen[index], prompted_parts[index], target_BV, models.student)
        losses.append(loss)
    return losses


def _logits(
    models: ModelPair,
    objectives: Sequence[TransferObjective],
    prompts: Sequence[torch.Tensor],
    chosen: Sequence[list[int]],
    unprompted_hidden: list[torch.Tensor],
) -> torch.Tensor:
    """Run the target on the examples of all prompts.

    Returns:
        Logits over the vocabulary: those at the answers or response tokens of each prompt in turn,
        followed by those of `unprompted_hidden`.
    """
    prompts_Gnd = torch.stack(list(prompts))
    device = prompts_Gnd.device
    target = models.target
    reader = objectives[0].reader

    # All tasks share the target's tokenizer, so one reader can pad the examples of all prompts.
    examples = []
    for objective, indices in zip(objectives, chosen, strict=True):
        examples += [objective.examples[index] for index in indices]
    batch = reader.collate(examples).to(device)
    # All prompts have equally many examples. Those of the first prompt come first, and so on.
    prompt_of_each_example = prompts_Gnd.repeat_interleave(len(chosen[0]), dim=0)

    # A response has several tokens, so the model returns hidden states at all its positions. The
    # head then runs only where there is a token to predict.
    if reader.generates:
        length = reader.task.max_response_length
        hidden_BRd = response_hidden(target, batch, length, prompt=prompt_of_each_example)
        masks = [
            objective.response_mask[indices]
            for objective, indices in zip(objectives, chosen, strict=True)
        ]
        mask_BR = torch.cat(masks).to(device)
        return target.head(torch.cat([hidden_BRd[mask_BR], *unprompted_hidden]))

    # A task with classes has one answer for each example. If the model family supports it, each
    # prompt runs once for all of its examples (see models/shared_prompt.py).
    logits: torch.Tensor = target(
        batch.input_ids,
        batch.attention_mask,
        prompts_Gnd if target.shares_prompt else prompt_of_each_example,
        batch.answer,
        share_prompt=target.shares_prompt,
        beside=torch.cat(unprompted_hidden) if unprompted_hidden else None,
    )
    return logits


def _prompted_counts(
    objectives: Sequence[TransferObjective], chosen: Sequence[list[int]]
) -> list[int]:
    """Count the prompted logits of each prompt: one for each example or response token."""
    counts = []
    for objective, indices in zip(objectives, chosen, strict=True):
        if objective.reader.generates:
            counts.append(int(objective.response_mask[indices].sum()))
        else:
            counts.append(len(indices))
    return counts
