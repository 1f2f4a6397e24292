"""The texts of a public task, for transfer: all that the provider's stage reads of it."""

from post_dist.config.sources import Task, placeholders
from post_dist.data.source import read_columns, texts_of
from post_dist.errors import InputError, PrivacyRefused


def load_public_texts(task: Task, where: str) -> list[str]:
    """The texts of a public task. Its label column is not read.

    Raises:
        PrivacyRefused: the task is private.
        InputError: it has no text.
    """
    if task.visibility != "public":
        raise PrivacyRefused(f"{where} is private; the provider's stages read public text alone", "give a task with `visibility: public`")
    texts = texts_of(read_columns(task, placeholders(task.text), task.hub_split, where), task.text)
    unique = [text for text in dict.fromkeys(texts) if text]
    if not unique:
        raise InputError(f"{where}: no row has any text")
    return unique[: task.max_rows]
