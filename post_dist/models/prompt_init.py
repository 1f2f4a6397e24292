"""Initial values of a soft prompt.

Shapes: n prompt tokens, d width.
"""

import torch
from transformers import PreTrainedTokenizerBase

from post_dist.data.limited_tokenizer import with_limits
from post_dist.errors import InputError
from post_dist.models.language_model import LanguageModel
from post_dist.runtime.gathering import gathered


def prompt_from_text(
    language_model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    num_virtual_tokens: int,
) -> torch.Tensor:
    """Return the embeddings of a text, repeated or cut to n tokens (PEFT's `TEXT` initialization).

    All ranks of a sharded model call this function together.

    Args:
        language_model: the model whose input embeddings are read.
        tokenizer: the model's tokenizer.
        text: the text.
        num_virtual_tokens: number n of prompt tokens.

    Returns:
        The prompt [n, d] in fp32, on the model's device.

    Raises:
        InputError: the text has no token of the model.
    """
    found = with_limits(lambda: tokenizer(text, add_special_tokens=False).input_ids, [text])
    tokens = _known(language_model, found)
    if not tokens:
        raise InputError(
            f"the start text {text!r} has no token of the model", "write another start text"
        )
    return _prompt_of(language_model, tokens, num_virtual_tokens)


def neutral_prompt(
    language_model: LanguageModel, tokenizer: PreTrainedTokenizerBase, num_virtual_tokens: int
) -> torch.Tensor:
    """Return the embedding of the token that ends a text, n times: it says nothing of a task.

    Args:
        language_model: the model whose input embeddings are read.
        tokenizer: the model's tokenizer.
        num_virtual_tokens: number n of prompt tokens.

    Returns:
        The prompt [n, d] in fp32, on the model's device.
    """
    # Not every tokenizer has both.
    named = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    tokens = _known(language_model, [token for token in named if token is not None])
    return _prompt_of(language_model, tokens[:1] or [0], num_virtual_tokens)


def _known(language_model: LanguageModel, tokens: list[int]) -> list[int]:
    """Return the tokens that the model has an embedding for. Some tokenizers know more."""
    return [token for token in tokens if token < language_model.vocabulary_size]


def _prompt_of(
    language_model: LanguageModel, tokens: list[int], num_virtual_tokens: int
) -> torch.Tensor:
    """Return the embeddings [n, d] of tokens, repeated or cut to n."""
    repetitions = -(-num_virtual_tokens // len(tokens))
    prompt_tokens = (tokens * repetitions)[:num_virtual_tokens]
    device = language_model.model.device
    embedding_table = language_model.model.get_input_embeddings()
    with torch.no_grad(), gathered(embedding_table):
        embeddings_nd = language_model.embed(torch.tensor(prompt_tokens, device=device))
        # A clone, because the gathered table is freed after this block.
        return embeddings_nd.float().clone()
