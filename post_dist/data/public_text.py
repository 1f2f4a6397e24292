"""The texts of a public task, for transfer, and the responses to them where text is generated: all that the provider's stage reads."""

from post_dist.config.sources import Task, placeholders
from post_dist.data.sources import read_columns, texts_of
from post_dist.errors import InputError, PrivacyRefused


def load_public_texts(task: Task, where: str) -> tuple[list[str], list[str]]:
    """The texts of a public task, each once, and the responses to them if it names their column. Its label column is not read.

    Raises:
        PrivacyRefused: the task is private.
        InputError: it has no text.
    """
    if task.visibility != "public":
        raise PrivacyRefused(
            f"{where} is private; the provider's stages read public text alone",
            "give a task with `visibility: public`",
        )
    columns = [*placeholders(task.text), *([task.response_column] if task.response_column else [])]
    table = read_columns(task, [*dict.fromkeys(columns)], task.hub_split, where)
    texts = texts_of(table, task.text)
    responses = (
        table[task.response_column].map(str).tolist() if task.response_column else [""] * len(texts)
    )
    unique: dict[str, str] = {}
    for text, response in zip(texts, responses, strict=True):
        if text:
            unique.setdefault(text, response.strip())
    if not unique:
        raise InputError(f"{where}: no row has any text")
    kept = list(unique.items())[: task.max_rows]
    return [text for text, _ in kept], [response for _, response in kept if task.response_column]
