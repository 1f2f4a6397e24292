"""Labelled rows of a task and their splits by a fixed hash. The provider's stages do not import this file."""

import hashlib
from dataclasses import dataclass

from post_dist.config.sources import Task, placeholders
from post_dist.data.sources import read_columns, texts_of
from post_dist.errors import InputError


@dataclass(frozen=True)
class Examples:
    """Texts with the index of their class among the task's `labels`, or with the response to each."""

    texts: list[str]
    classes: list[int]
    responses: list[str]


def load_examples(task: Task, split: str, where: str) -> Examples:
    """The labelled rows of one split, each text once; a text that stands under two labels (or has two responses) is left out.

    So one row more or less in the file changes one example at most, which is what private tuning counts on. (To keep the first
    of two labels would let one row replace an example, and to replace is twice as much as to add.)

    Args:
        task: the task.
        split: train, validation or test.
        where: the run file's section, for messages.

    Raises:
        InputError: a label is not in the verbalizer (the row is named, never its contents), or the split is empty.
    """
    own_test_set = task.test_hub_split is not None
    hub_split = task.test_hub_split if own_test_set and split == "test" else task.hub_split
    generates = task.response_column is not None
    answer_column = task.response_column or task.label_column
    columns = [*dict.fromkeys([*placeholders(task.text), answer_column])]
    table = read_columns(task, columns, str(hub_split), where)
    classes = {label: index for index, label in enumerate(task.labels)}
    rows: dict[str, int | str] = {}
    disputed = set()
    for number, (text, label) in enumerate(
        zip(texts_of(table, task.text), table[answer_column].map(str), strict=True), 1
    ):
        if not generates and label not in classes:
            raise InputError(
                f"{where}: row {number} has a label in column '{task.label_column}' that is not in the verbalizer",
                f"{where}.labels has {', '.join(classes)}",
            )
        belongs = (own_test_set and split == "test") or split_of(text, task) == split
        answer = label.strip() if generates else classes[label]
        if text and belongs and rows.setdefault(text, answer) != answer:
            disputed.add(text)
    rows = {text: index for text, index in rows.items() if text not in disputed}
    if not rows:
        raise InputError(f"{where}: no row falls into the {split} split")
    kept = list(rows.items())
    if task.max_rows is not None:  # drawn by hash, for files are often sorted by class
        kept = sorted(kept, key=lambda row: _place(row[0], task))[: task.max_rows]
    answers = [answer for _, answer in kept]
    texts = [text for text, _ in kept]
    return (
        Examples(texts, [], [str(answer) for answer in answers])
        if generates
        else Examples(texts, [int(answer) for answer in answers], [])
    )


def split_of(text: str, task: Task) -> str:
    """Which split a text belongs to: decided by sha256 of the salt and the text alone, so it never changes.

    A task with a test set of its own draws only train and validation.
    """
    place = _place(text, task)
    test_share = 0.0 if task.test_hub_split is not None else task.test_share
    if place < test_share:
        return "test"
    return "validation" if place < test_share + task.validation_share else "train"


def _place(text: str, task: Task) -> float:
    """Where a text falls between 0 and 1."""
    return (
        int.from_bytes(hashlib.sha256(f"{task.split_salt}\n{text}".encode()).digest()[:8]) / 2**64
    )
