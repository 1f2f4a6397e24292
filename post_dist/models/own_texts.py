"""Texts that a model writes itself. They are public, because no data goes into them."""

from post_dist.data.limited_tokenizer import with_limits
from post_dist.data.task_reader import TaskReader
from post_dist.models.generation import sampled_texts
from post_dist.models.language_model import LanguageModel

_TOKENS = 24
"""Length of a text."""
_CHARACTERS = 1000
"""Longest text. A hostile tokenizer may make far longer ones of a few tokens."""


def own_texts(model: LanguageModel, reader: TaskReader, count: int) -> list[str]:
    """Let a causal model write texts of the kind that a task has.

    On one machine they are the same each time. Another may round differently, and sample others.

    Args:
        model: a causal model.
        reader: the task, bound to the model's tokenizer.
        count: number of texts.
    """
    # The tokenizer may be anybody's, and so may the texts that it makes of tokens.
    first_tokens = with_limits(reader.template.first_tokens, [reader.task.template])
    texts = reader.texts_of(sampled_texts(model, first_tokens, count, _TOKENS))
    return [text[:_CHARACTERS] for text in texts]
