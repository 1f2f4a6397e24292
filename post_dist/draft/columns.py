"""The columns of a table that make its examples, and the values of the labels."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from post_dist.config.sources import is_label_name
from post_dist.data.sources import rows_with
from post_dist.errors import InputError

FEWEST_OF_LABEL = 10
"""Fewest texts, or users, of a label that `init` publishes.

The validation and the test split have a tenth each. Of fewer, they have less than one on average,
so nobody could tell whether the class was learned. But its name would tell that somebody has it.
"""
_MOST_CLASSES = 50
_UNUSABLE = set('{}!:"\\')
"""Characters that a column's name may not have, because `text` is a format string."""
_MOST_WORDS = 3
"""Most words of a name that a message may quote. A line with more may be a private example."""


@dataclass(frozen=True)
class Columns:
    """The columns of a table that make its examples.

    Attributes:
        text: column of the texts.
        label: column of the labels.
        user: column with the user of each text; None if each text is protected by itself.
    """

    text: str
    label: str
    user: str | None = None

    @property
    def units(self) -> str:
        """What epsilon protects and labels are counted by: different texts, or users."""
        return "different texts" if self.user is None else "users"


def chosen_columns(
    table: pd.DataFrame, data: Path, text: str | None, label: str | None, user: str | None
) -> Columns:
    """Return the columns that are given, or both columns of a table that has no others.

    Args:
        table: the table.
        data: its file, for messages.
        text: column of the texts.
        label: column of the labels.
        user: column with the user of each text; None if no user has several.

    Raises:
        InputError: a column is not given or does not exist, or its name cannot be used. The
            message guesses a missing one.
    """
    # A column without a name in the file may have a number for a name.
    names = [str(name) for name in table.columns]
    listed = ", ".join(names)
    if text is None or label is None:
        guess = _guess(table)
        # Of two columns, texts and labels are hard to confuse.
        if len(names) == 2 and (text, label, user) == (None, None, None):
            return _usable(guess, table, data)
        _check_has_header(names, data)
        raise InputError(
            f"{data.name} has the columns {listed}",
            f"name two of them, perhaps --text '{guess.text}' --label '{guess.label}'",
        )
    for option, column in (("--text", text), ("--label", label), ("--user", user)):
        if column is not None and column not in names:
            _check_has_header(names, data)
            raise InputError(
                f"{option}: {data.name} has no column '{column}'", f"columns: {listed}"
            )
    return _usable(Columns(text, label, user), table, data)


def _check_has_header(names: list[str], data: Path) -> None:
    """Refuse to list the columns of a file if the first line seems to be an example.

    Raises:
        InputError: names have many words. The message does not quote them.
    """
    if any(len(name.split()) > _MOST_WORDS for name in names):
        raise InputError(
            f"{data.name}: no such columns, and the first line seems to be an example",
            "write a line with the names of the columns above it, such as text,label; or give "
            "--text and --label as the first line has them",
        )


def _usable(columns: Columns, table: pd.DataFrame, data: Path) -> Columns:
    """Return columns whose names a run file can hold."""
    # The label would get into the run file, and from there into the prompt.
    if columns.label in set(table[columns.label].map(str)):
        raise InputError(
            f"{data.name}: the column of the labels is called as one of its own labels, so the "
            "first line seems to be an example",
            "write a line with the names of the columns above it, such as text,label, or rename "
            "the column",
        )
    # `text` of the run file is a format string, in which these characters mean something else.
    if _UNUSABLE & set(columns.text):
        raise InputError(
            f"--text: the name of column '{columns.text}' has one of {' '.join(sorted(_UNUSABLE))}",
            "rename the column",
        )
    if not (columns.text + columns.label).isprintable():
        raise InputError(f"{data.name}: the name of a column is not printable", "rename the column")
    return columns


def _guess(table: pd.DataFrame) -> Columns:
    """Guess the columns: the longest values are texts, and the fewest different ones labels."""
    lengths = {str(name): table[name].map(str).map(len).mean() for name in table.columns}
    text = max(lengths, key=lambda name: lengths[name])
    others = [name for name in lengths if name != text] or [text]
    different = {name: table[name].map(str).nunique() for name in others}
    # A column with one value tells no classes apart.
    label = min(different, key=lambda name: (different[name] < 2, different[name]))
    return Columns(text, label)


def count_units(table: pd.DataFrame, columns: Columns) -> int:
    """Return how many rows a table has, or how many users if epsilon holds for users."""
    if columns.user is None:
        return len(table)
    # As the stages count: a row without a user is left out.
    return int(rows_with(table, columns.user)[columns.user].map(str).nunique())


def label_values(table: pd.DataFrame, column: str) -> list[str]:
    """Return the values of the label column, in a fixed order.

    Raises:
        InputError: a value cannot be a label, or there are too few or too many.
    """
    labels = sorted(set(table[column].map(str)))
    if not 2 <= len(labels) <= _MOST_CLASSES:
        raise InputError(
            f"--label: column '{column}' has {len(labels)} different values, and a task has 2 to "
            f"{_MOST_CLASSES} classes",
            "is it the column of the labels?",
        )
    if not all(map(is_label_name, labels)):
        raise InputError(
            f"--label: a value of column '{column}' is too long or not printable",
            "a label is at most 100 printable characters",
        )
    return labels


def rare_labels(table: pd.DataFrame, columns: Columns, labels: Sequence[str]) -> list[str]:
    """Return the labels that fewer than `FEWEST_OF_LABEL` texts have, or users if there are any.

    Raises:
        InputError: the other labels are fewer than two.
    """
    # As tuning counts: a row without a text is left out, and equal texts are one example.
    used = rows_with(table, columns.text)
    if columns.user is not None:
        used = rows_with(used, columns.user)
    units = used[columns.user or columns.text].map(str).str.strip()
    pairs = set(zip(used[columns.label].map(str), units, strict=True))
    number_of_units = Counter(label for label, _ in pairs)
    rare = [label for label in labels if number_of_units[label] < FEWEST_OF_LABEL]
    if len(labels) - len(rare) < 2:
        raise InputError(
            f"--label: fewer than 2 values of column '{columns.label}' have {FEWEST_OF_LABEL} "
            f"{columns.units} or more",
            "is it the column of the labels? If it is, merge labels, or add examples",
        )
    return rare
