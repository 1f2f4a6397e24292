"""Load the public text for transfer: the texts of a public task, and its responses if it has any.

The label column is never read, so the provider's stage sees no labels.
"""

from post_dist.config.sources import Task
from post_dist.data.sources import read_rows
from post_dist.errors import InputError, PrivacyRefused


def load_public_texts(task: Task, where: str) -> tuple[list[str], list[str]]:
    """Load the distinct texts of a public task, and the responses to them.

    Args:
        task: the task; its label column is not read.
        where: the run file's section, for messages.

    Returns:
        The texts, and one response for each. The second list is empty if the task has no
        `response_column`.

    Raises:
        PrivacyRefused: the task is private.
        InputError: the task has no text.
    """
    if task.visibility != "public":
        raise PrivacyRefused(
            f"{where} is private; the provider's stages read public text alone",
            "give a task with `visibility: public`",
        )
    rows = read_rows(task, task.hub_split, where, task.response_column)
    # For a text with several responses, the first one is kept.
    responses = rows.answers or [""] * len(rows.texts)
    response_of: dict[str, str] = {}
    for text, response in zip(rows.texts, responses, strict=True):
        if text:
            response_of.setdefault(text, response.strip())
    if not response_of:
        raise InputError(f"{where}: no row has any text")

    # `max_rows` keeps the first texts. Unlike private ones, they need no selection by hash.
    kept = list(response_of)[: task.max_rows]
    if not task.response_column:
        return kept, []
    return kept, [response_of[text] for text in kept]
