"""Generate text with a frozen causal model, or compute the loss of given responses.

Shapes: B examples of a batch, N examples, T tokens, R tokens of a response, n prompt tokens,
d width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import GenerationConfig

from post_dist.conflicts import Conflict
from post_dist.data.template import NO_TOKEN, Batch, Encoded, Template
from post_dist.errors import InputError
from post_dist.models.batch_inference import InferenceRun, map_batches
from post_dist.models.facts import ModelFacts
from post_dist.models.language_model import LanguageModel

_FILLING = 0
"""What follows the end of a response in a batch. It is cut off."""


def generation_conflicts(whose: str, model: ModelFacts, response_length: int) -> list[Conflict]:
    """Check that a model can generate responses behind embeddings.

    Args:
        whose: name of the model in the message, such as `the student`.
        model: facts of the model.
        response_length: most tokens of a response; 0 for a task with classes.
    """
    if not response_length or model.generates:
        return []
    return [
        Conflict(
            f"{whose}, a {model.family}, cannot generate text behind a soft prompt",
            "use a causal model of another family, or a task with labels",
        )
    ]


def response_hidden(
    model: LanguageModel,
    batch: Batch,
    length: int,
    *,
    prompt: torch.Tensor | None = None,
    prefix: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Compute the hidden states from which the tokens of each response are predicted.

    Args:
        model: a causal model.
        batch: examples with their responses appended.
        length: number R of positions for each example. States after the end of a shorter response
            have no meaning.
        prompt: soft prompt [n, d] or [B, n, d]; None for no prompt.
        prefix: keys and values of a soft prompt, in place of `prompt`.

    Returns:
        Last hidden states [B, R, d].
    """
    hidden_BTd = model(batch.input_ids, batch.attention_mask, prompt, None, prefix)
    # A prompt shifts all positions. A prefix does not, because its states are not in the output.
    prompt_length = hidden_BTd.shape[1] - batch.input_ids.shape[1]
    first_B = batch.answer + prompt_length
    positions_BR = first_B[:, None] + torch.arange(length, device=first_B.device)
    # Positions past the end are clamped to the last position, so that the index is valid.
    positions_BR = positions_BR.clamp(max=hidden_BTd.shape[1] - 1)
    examples_B1 = torch.arange(len(first_B), device=first_B.device)[:, None]
    return hidden_BTd[examples_B1, positions_BR]


def response_losses(
    model: LanguageModel,
    batch: Batch,
    responses_BR: torch.Tensor,
    *,
    prompt: torch.Tensor | None = None,
    prefix: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Compute the cross-entropy of each response, averaged over its tokens.

    The head runs on R positions of every example, even if its response is shorter. The shapes, and
    so the rounding, do not depend on the other examples of the batch. Private tuning needs this.

    Args:
        model: a causal model.
        batch: examples with their responses appended.
        responses_BR: tokens of the responses, padded with NO_TOKEN.
        prompt: soft prompt [n, d] or [B, n, d]; None for no prompt.
        prefix: keys and values of a soft prompt, in place of `prompt`.

    Returns:
        Losses [B], in fp32 or wider.
    """
    hidden_BRd = response_hidden(model, batch, responses_BR.shape[1], prompt=prompt, prefix=prefix)
    logits = model.head(hidden_BRd.flatten(0, 1))
    # Cross-entropy in bf16 would lose the differences that training needs.
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = functional.cross_entropy(
        wide, responses_BR.flatten(), ignore_index=NO_TOKEN, reduction="none"
    )
    losses_BR = losses.view_as(responses_BR)
    num_tokens_B = (responses_BR != NO_TOKEN).sum(dim=1)
    return losses_BR.sum(dim=1) / num_tokens_B


def generate_responses(
    model: LanguageModel,
    examples: list[Encoded],
    template: Template,
    prompt_nd: torch.Tensor | None,
    end_token: int,
    run: InferenceRun,
) -> torch.Tensor:
    """Generate a response to each example by greedy decoding.

    Args:
        model: a causal model.
        examples: examples without responses.
        template: pads the examples of a batch, and limits the length of a response.
        prompt_nd: soft prompt [n, d] before each example; None for no prompt.
        end_token: token that ends a response.
        run: batch size, ranks and label.

    Returns:
        Tokens [N, R] without the end token, padded with NO_TOKEN, on the CPU of every rank.

    Raises:
        InputError: the model reads padding, and there are several ranks.
    """
    length = template.max_response_length
    greedy = GenerationConfig(
        max_new_tokens=length, do_sample=False, eos_token_id=end_token, pad_token_id=_FILLING
    )

    def respond(**inputs: Any) -> torch.Tensor:
        # pyrefly: ignore[not-callable] - a method of every model with a causal head
        tokens_BR = model.model.generate(**inputs, generation_config=greedy)
        whole_BR = functional.pad(tokens_BR, (0, length - tokens_BR.shape[1]), value=_FILLING)
        # A batch is shorter only if all its responses have ended.
        ended = (whole_BR == end_token).cumsum(dim=1) > 0
        return whole_BR.masked_fill(ended, NO_TOKEN)

    def generate(chosen: list[Encoded]) -> torch.Tensor:
        batch = template.collate(chosen).to(run.world.device)
        embeddings, mask = _padded_on_the_left(model, batch, prompt_nd)
        # All ranks of a sharded model run the same number of forward passes.
        synced = run.world.size > 1
        return respond(inputs_embeds=embeddings, attention_mask=mask, synced_gpus=synced)

    def generate_behind_prefix(chosen: list[Encoded]) -> torch.Tensor:
        batch = template.collate(chosen).to(run.world.device)
        cache = model.new_cache(len(chosen))
        embeddings = _behind_cached(model.embed(batch.input_ids), cache.get_seq_length())
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        return respond(inputs_embeds=embeddings, attention_mask=mask, cache=cache)

    with _own_settings_aside(model):
        if model.has_prefix:
            # Padding would be between the prefix and the text, and some families count its
            # positions. Only a whole model has a prefix.
            compute = _by_length(generate_behind_prefix)
        elif model.ignores_left_padding:
            compute = generate
        elif run.world.size == 1:
            compute = _by_length(generate)
        else:
            raise InputError(
                f"a {type(model.model).__name__} reads padding, so it cannot generate on several "
                "ranks",
                "run it on one rank",
            )
        return map_batches(examples, compute, run)


def sampled_texts(
    model: LanguageModel, first_tokens: Sequence[int], count: int, length: int
) -> torch.Tensor:
    """Let a causal model write texts. On one machine it always writes the same ones.

    Args:
        model: a causal model.
        first_tokens: tokens that each text starts with, one or more. The result leaves them out.
        count: number of texts N.
        length: number of tokens R of each text.

    Returns:
        The tokens [N, R], on the CPU.
    """
    device = model.model.device
    input_ids = torch.tensor([first_tokens] * count, device=device)
    sampling = GenerationConfig(
        min_new_tokens=length,
        max_new_tokens=length,
        do_sample=True,
        top_k=0,
        pad_token_id=_FILLING,
        # Nobody has checked that the logits of a model are finite.
        remove_invalid_values=True,
    )
    # The caller's random numbers go on where they were.
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus), _own_settings_aside(model):
        torch.manual_seed(0)
        # pyrefly: ignore[not-callable] - a method of every model with a causal head
        tokens: torch.Tensor = model.model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), generation_config=sampling
        )
    return tokens[:, len(first_tokens) :].cpu()


@contextmanager
def _own_settings_aside(model: LanguageModel) -> Iterator[None]:
    """Generate without the settings that a model's folder may bring, such as sampling."""
    own_settings = model.model.generation_config
    model.model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.model.generation_config = own_settings


def _padded_on_the_left(
    model: LanguageModel, batch: Batch, prompt_nd: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the embeddings [B, n+T, d] of a prompt and texts, and their attention mask [B, n+T].

    The padding comes first, so that all texts end where their responses begin.
    """
    embeddings = model.embed_behind(prompt_nd, batch.input_ids)
    padding_B = batch.input_ids.shape[1] - 1 - batch.answer
    places = torch.arange(embeddings.shape[1], device=embeddings.device) - padding_B[:, None]
    rows_B1 = torch.arange(len(embeddings), device=embeddings.device)[:, None]
    return embeddings[rows_B1, places.clamp(min=0)], (places >= 0).long()


def _by_length(
    generate: Callable[[list[Encoded]], torch.Tensor],
) -> Callable[[list[Encoded]], torch.Tensor]:
    """Return a function that generates for the examples of one length together."""

    def generate_by_length(examples: list[Encoded]) -> torch.Tensor:
        groups: dict[int, list[int]] = {}
        for row, example in enumerate(examples):
            groups.setdefault(len(example.token_ids), []).append(row)
        order = torch.tensor([row for rows in groups.values() for row in rows])
        found = [generate([examples[row] for row in rows]) for rows in groups.values()]
        return torch.cat(found)[order.argsort()]

    return generate_by_length


def _behind_cached(embeddings: torch.Tensor, count: int) -> torch.Tensor:
    """Return embeddings [B, n+T, d] with zeros for n cached tokens, which transformers cuts off."""
    size, _, width = embeddings.shape
    return torch.cat([embeddings.new_zeros(size, count, width), embeddings], dim=1)
