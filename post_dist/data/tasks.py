"""Load the labeled examples of a task, and divide them into splits by a fixed hash.

The provider's stages do not import this file.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from post_dist.config.sources import Task
from post_dist.data.sources import is_missing, read_rows
from post_dist.errors import InputError
from post_dist.runtime.private_process import leave_no_core_dump, refuse_connections

Answer = TypeVar("Answer")
"""A label as it is written, the index of a class, or a response."""


@dataclass(frozen=True)
class Examples:
    """The labeled examples of a split.

    Attributes:
        texts: the texts.
        classes: for a task with classes, the index of each text's class among the task's labels.
        responses: for a task that generates text, the response to each text.
        users: for a task with a user column, the number of each text's user.
    """

    texts: list[str]
    classes: list[int]
    responses: list[str]
    users: list[int]


@dataclass(frozen=True)
class AnsweredRow:
    """A row that has a text, and a label or a response.

    Attributes:
        number: number of the row in the source, from 1.
        user: the user; empty without a user column, as if all rows were those of one user.
        text: the text.
        written: the label or response as it is written.
    """

    number: int
    user: str
    text: str
    written: str


def load_examples(task: Task, split: str, where: str) -> Examples:
    """Load the labeled examples of one split, each text once.

    If they come from a file, this process then makes no connection until a
    `forgetting_private_data` around it ends.

    A row without a text or label is left out, and so is a text with two different labels or
    responses.
    One row more or less in the file then adds or removes at most one example. Private tuning relies
    on that. If the first of two labels were kept, one row could replace an example. A replacement
    counts as two changes.

    With a user column, a text is kept once for each user, and a user's labels never dispute those
    of another. All rows of one user more or less in the file then change no other user's examples.

    Args:
        task: the task.
        split: train, validation or test.
        where: the run file's section, for messages.

    Raises:
        InputError: a label is not in the task's labels, or the split is empty. The message gives
            the number of the row, and never its contents.
    """
    answers_found = []
    for row in answered_rows(task, split, where):
        user, text = row.user, row.text
        # Rows of other splits are checked too, so every run finds a wrong label.
        answer = _answer(task, row.written, row.number, where)
        # The examples of a user are not divided.
        if _belongs(task, user or text, split):
            answers_found.append((user, text, answer))
    answer_of = undisputed(answers_found)
    if not answer_of:
        raise InputError(f"{where}: the {split} split is empty")

    kept = list(answer_of)
    if task.max_rows is not None:
        # Texts are selected by hash, because files are often sorted by class.
        kept = sorted(kept, key=lambda key: _place(key[1], task))[: task.max_rows]
    answers = [answer_of[key] for key in kept]
    # An example has either a class or a response, so one of the two lists is empty.
    generates = task.response_column is not None
    return Examples(
        texts=[text for _, text in kept],
        classes=[] if generates else [int(answer) for answer in answers],
        responses=[str(answer) for answer in answers] if generates else [],
        users=[] if task.user_column is None else _numbered(user for user, _ in kept),
    )


def answered_rows(task: Task, split: str, where: str) -> list[AnsweredRow]:
    """Read the rows that have a text, and a label or a response. Labels are not checked.

    If they come from a file, this process then makes no connection, as in `load_examples`.

    Args:
        task: the task.
        split: names the split of a hub data set; a file is always read whole.
        where: the run file's section, for messages.
    """
    answer_column = task.response_column or task.label_column
    leave_no_core_dump()
    rows = read_rows(task, _hub_split(task, split), where, answer_column, task.user_column)
    # Another split of a hub data set may have to be fetched. The steps of tuning come behind it.
    if task.path is not None:
        refuse_connections()
    users = rows.users or [""] * len(rows.texts)
    columns = zip(rows.numbers, users, rows.texts, rows.answers, strict=True)
    found = [AnsweredRow(*values) for values in columns]
    return [row for row in found if row.text and not _is_unanswered(task, row.written)]


def undisputed(answers: Iterable[tuple[str, str, Answer]]) -> dict[tuple[str, str], Answer]:
    """Return the answer to each text of a user, without texts that have two different answers.

    Args:
        answers: a user, a text and an answer of each row.
    """
    answer_of: dict[tuple[str, str], Answer] = {}
    disputed = set()
    for user, text, answer in answers:
        if answer_of.setdefault((user, text), answer) != answer:
            disputed.add((user, text))
    # Disputed texts are removed at the end. Otherwise a third row could add the text again.
    for key in disputed:
        del answer_of[key]
    return answer_of


def _numbered(users: Iterable[str]) -> list[int]:
    """Return a number for each name, in the order in which the names first appear."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(user, len(numbers)) for user in users]


def split_of(unit: str, task: Task) -> str:
    """Return the split of a text or of a user, by the sha256 of salt and unit. It never changes.

    A task with a separate test set is divided into train and validation only.
    """
    # The place does not depend on the shares, so a larger share only adds examples to a split.
    place = _place(unit, task)
    if place < task.hashed_test_share:
        return "test"
    if place < task.hashed_test_share + task.validation_share:
        return "validation"
    return "train"


def _hub_split(task: Task, split: str) -> str:
    if split == "test" and task.test_hub_split is not None:
        return task.test_hub_split
    return task.hub_split


def _belongs(task: Task, unit: str, split: str) -> bool:
    """Return whether a text or user belongs to a split. A separate test set is the test split."""
    has_own_test_set = task.test_hub_split is not None
    return (has_own_test_set and split == "test") or split_of(unit, task) == split


def _is_unanswered(task: Task, written: str) -> bool:
    """Return whether a row has nothing in the column of its label or response."""
    is_label = task.response_column is None and written in task.labels
    return is_missing(written) and not is_label


def _answer(task: Task, written: str, row: int, where: str) -> int | str:
    """Return the class of an example, or its response for a task that generates text."""
    if task.response_column is not None:
        return written.strip()
    labels = list(task.labels)
    if written in labels:
        return labels.index(written)
    # A label is the same with white space around it, and 1.0 is 1.
    plain = list(map(plain_label, labels))
    if plain_label(written) not in plain:
        raise InputError(
            f"{where}: row {row} has a label in column '{task.label_column}' "
            f"that is not in {where}.labels",
            f"add it there with a word, or change the row; {where}.labels has {', '.join(labels)}",
        )
    return plain.index(plain_label(written))


def plain_label(label: str) -> str:
    """Return a label without white space around it; a whole number without decimals."""
    found = re.fullmatch(r"(-?\d+)\.0+", label.strip())
    return label.strip() if found is None else found[1]


def _place(unit: str, task: Task) -> float:
    """Return the place of a text or of a user, a fixed pseudo-random number from 0 to 1."""
    # The first 64 bits of the digest, as a fraction of their range.
    digest = hashlib.sha256(f"{task.split_salt}\n{unit}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
