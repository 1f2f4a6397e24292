"""Where a soft prompt starts.

Shapes: n prompt tokens, d width.
"""

import torch
from transformers import PreTrainedTokenizerBase

from post_dist.errors import InputError
from post_dist.models.language_model import LanguageModel
from post_dist.runtime.zero import gathered


def prompt_from_text(
    language_model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    num_virtual_tokens: int,
) -> torch.Tensor:
    """The embeddings [n, d] in fp32 of a text, repeated or cut to n tokens (as PEFT's TEXT initialisation)."""
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    repeated = (tokens * -(-num_virtual_tokens // len(tokens)))[:num_virtual_tokens]
    table = language_model.model.get_input_embeddings()
    with torch.no_grad(), gathered(table):
        return (
            language_model.embed(torch.tensor(repeated, device=language_model.model.device))
            .float()
            .clone()
        )


def check_room(language_model: LanguageModel, num_virtual_tokens: int, max_length: int) -> None:
    """Check that prompt and text fit into the model's context together.

    Raises:
        InputError: they do not.
    """
    context = language_model.context_length
    if num_virtual_tokens + max_length > context:
        raise InputError(
            f"a prompt of {num_virtual_tokens} tokens and texts of {max_length} do not fit into the model's context of {context}",
            "lower tune.num_virtual_tokens or max_length",
        )
