"""Texts that a model writes itself. They are public, because no data goes into them."""

from post_dist.data.limited_tokenizer import with_limits
from post_dist.data.task_reader import TaskReader
from post_dist.models.generation import sampled_texts
from post_dist.models.language_model import LanguageModel

_TOKENS = 24
"""Length of a text."""


def own_texts(model: LanguageModel, reader: TaskReader, count: int) -> list[str]:
    """Let a causal model write texts of the kind that a task has. They are the same each time.

    Args:
        model: a causal model.
        reader: the task, bound to the model's tokenizer.
        count: number of texts.
    """
    return reader.texts_of(sampled_texts(model, _first_tokens(reader), count, _TOKENS))


def _first_tokens(reader: TaskReader) -> list[int]:
    """Return what each text starts with: the template before the text."""
    tokenizer = reader.tokenizer
    before, _, _ = reader.task.template.partition("{text}")
    tokens: list[int] = with_limits(lambda: tokenizer(before.rstrip()).input_ids, [before])
    # Without any word to start from, the model needs a token that stands before a text.
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
    return tokens or [next(token for token in ends if token is not None)]
