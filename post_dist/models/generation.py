"""Generate responses with a frozen causal model, or compute the loss of given responses.

Shapes: B examples of a batch, N examples, T tokens, R tokens of a response, n prompt tokens,
d width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn import functional

from post_dist.data.template import NO_TOKEN, Batch, Encoded, Template
from post_dist.models.batch_inference import InferenceRun, map_batches
from post_dist.models.language_model import LanguageModel


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
    prompt_length = 0 if prompt is None else prompt.shape[-2]
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

    Every token takes a forward pass over the whole text. There is no cache, because all ranks of a
    sharded model must run the same number of forward passes.

    Args:
        model: a causal model.
        examples: examples without responses.
        template: pads the examples of a batch, and limits the length of a response.
        prompt_nd: soft prompt [n, d] before each example; None for no prompt.
        end_token: token that ends a response.
        run: batch size, ranks and label.

    Returns:
        Tokens [N, R] without the end token, padded with NO_TOKEN, on the CPU of every rank.
    """
    share_prompt = prompt_nd is not None and model.shares_prompt
    world = run.world

    def generate(chosen: list[Encoded]) -> torch.Tensor:
        # Each draft grows by one token in each round until it ends.
        drafts = [_Draft(example, end_token) for example in chosen]
        for _ in range(template.max_response_length):
            batch = template.collate([draft.example for draft in drafts]).to(world.device)
            logits_BV = model(
                batch.input_ids,
                batch.attention_mask,
                prompt_nd,
                batch.answer,
                share_prompt=share_prompt,
            )
            likeliest = logits_BV.argmax(dim=1).tolist()
            for draft, token in zip(drafts, likeliest, strict=True):
                draft.append(token)
            # A rank whose responses have all ended keeps running until all ranks have finished.
            if not world.any(any(not draft.ended for draft in drafts)):
                break
        padded = [draft.padded(template.max_response_length) for draft in drafts]
        return torch.tensor(padded, device=world.device)

    return map_batches(examples, generate, run)


class _Draft:
    """A response that is being generated.

    Attributes:
        example: the text with the tokens generated so far. Its answer position is the last token.
    """

    def __init__(self, example: Encoded, end_token: int) -> None:
        self.example = example
        self._end_token = end_token
        self._tokens: list[int] = []

    @property
    def ended(self) -> bool:
        """Whether the end token has been generated."""
        return bool(self._tokens) and self._tokens[-1] == self._end_token

    def append(self, token: int) -> None:
        """Add a token, unless the response has ended."""
        if self.ended:
            return
        self._tokens.append(token)
        self.example = replace(
            self.example,
            token_ids=[*self.example.token_ids, token],
            answer=self.example.answer + 1,
        )

    def padded(self, length: int) -> list[int]:
        """Return the tokens without the end token, padded to `length` with NO_TOKEN."""
        text = [token for token in self._tokens if token != self._end_token]
        return text + [NO_TOKEN] * (length - len(text))
