"""The columns of a table that make its examples."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from post_dist.data.sources import is_missing
from post_dist.errors import InputError

MOST_CLASSES = 50
_TEXT_NAMES = {"text", "texts"}
_LABEL_NAMES = {"label", "labels"}
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
        InputError: a column is not given or does not exist, two are the same, or a name cannot be
            used. The message guesses a missing one.
    """
    names = [str(name) for name in table.columns]
    if len(names) < 2:
        raise InputError(
            f"--data: {data.name} has one column, and a table needs texts and labels",
            "add a column of labels; if there is one, separate it by commas, semicolons or tabs",
        )
    options = {"--text": text, "--label": label, "--user": user}
    given = {option: column for option, column in options.items() if column is not None}
    _check_given(given, names, data)
    if len(names) == 2 and not given:
        text, label = _told_apart(table, data)
    if text is None or label is None:
        _check_has_header(names, data)
        text, label = _guess(table, text, label, user)
        advice = "add a column: texts, labels and users have one each"
        if text is not None and label is not None:
            advice = f"name two of them, perhaps --text '{text}' --label '{label}'"
        raise InputError(f"{data.name} has the columns {', '.join(names)}", advice)
    return _usable(Columns(text, label, user), table, data)


def _check_given(given: dict[str, str], names: list[str], data: Path) -> None:
    """Check the columns that options name.

    Raises:
        InputError: one does not exist, or two are the same.
    """
    option_of: dict[str, str] = {}
    for option, column in given.items():
        if column not in names:
            _check_has_header(names, data)
            raise InputError(
                f"{option}: {data.name} has no column '{column}'", f"columns: {', '.join(names)}"
            )
        other = option_of.setdefault(column, option)
        # Labels become part of the prompt, so texts or users would too.
        if other != option:
            raise InputError(
                f"{other} and {option} name the same column",
                "name a column of its own for each; a table of texts alone needs one of labels",
            )


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
    _check_label_name(columns, table, data)
    # `text` of the run file is a format string, in which these characters mean something else.
    if _UNUSABLE & set(columns.text):
        raise InputError(
            f"--text: the name of column '{columns.text}' has one of {' '.join(sorted(_UNUSABLE))}",
            "rename the column",
        )
    if not (columns.text + columns.label + (columns.user or "")).isprintable():
        raise InputError(f"{data.name}: the name of a column is not printable", "rename the column")
    return columns


def _check_label_name(columns: Columns, table: pd.DataFrame, data: Path) -> None:
    """Refuse a table in which the name of the label column is a label too.

    It would get into the run file, and from there into the prompt.

    Raises:
        InputError: a row repeats the header, or the first line seems to be an example.
    """
    labels = enumerate(table[columns.label].map(str))
    named = [place for place, label in labels if label == columns.label]
    if not named:
        return
    header = [str(name) for name in table.columns]
    # Files were joined, each with its header, and perhaps with a byte order mark.
    rows = (map(str, table.iloc[place]) for place in named)
    if all([value.strip("\ufeff") for value in row] == header for row in rows):
        raise InputError(
            f"--data: row {named[0] + 1} of {data.name} repeats the header",
            "delete the row; rows are counted from 1 below the header",
        )
    raise InputError(
        f"{data.name}: the column of the labels is called as one of its own labels, so the "
        "first line seems to be an example",
        "write a line with the names of the columns above it, such as text,label, or rename "
        "the column",
    )


def _told_apart(table: pd.DataFrame, data: Path) -> tuple[str, str]:
    """Return which of two columns has the texts, and which the labels.

    Raises:
        InputError: neither their names nor their values tell.
    """
    first, second = names = [str(name) for name in table.columns]
    other = {first: second, second: first}
    # A name is certain, and that of one column settles both.
    text = _only(names, _TEXT_NAMES)
    label = _only(names, _LABEL_NAMES)
    if text is None and label is None:
        # A private run needs more different texts than a task may have classes.
        many = [name for name in names if _number_of_values(table[name]) > MOST_CLASSES]
        if len(many) != 1:
            _check_has_header(names, data)
            raise InputError(
                f"{data.name} has the columns {first}, {second}, and neither names nor values tell "
                "which has the labels",
                "name them with --text and --label",
            )
        text = many[0]
    text = text or other[str(label)]
    return text, other[text]


def _guess(
    table: pd.DataFrame, text: str | None, label: str | None, user: str | None
) -> tuple[str | None, str | None]:
    """Guess the columns of texts and labels that are not given, among those that are free.

    Args:
        table: the table.
        text: column of the texts, if it is given.
        label: column of the labels, if it is given.
        user: column of the users, if it is given.

    Returns:
        The column of the texts and that of the labels; None for one if no column is left.
    """
    free = [str(name) for name in table.columns if str(name) not in (text, label, user)]
    text = text or _only(free, _TEXT_NAMES)
    label = label or _only(free, _LABEL_NAMES)
    free = [name for name in free if name not in (text, label)]
    if text is None and free:
        text = max(free, key=lambda name: _mean_length(table[name]))
        free.remove(text)
    if label is None and free:
        counts = {name: _number_of_values(table[name]) for name in free}
        # A column with one value tells no classes apart.
        label = min(free, key=lambda name: (counts[name] < 2, counts[name]))
    return text, label


def _only(names: Sequence[str], known: Collection[str]) -> str | None:
    """Return the only column with one of some known names; None if there are none or several."""
    found = [name for name in names if name.strip().lower() in known]
    return found[0] if len(found) == 1 else None


def _written(values: pd.Series) -> list[str]:
    return [str(value).strip() for value in values if not is_missing(value)]


def _number_of_values(values: pd.Series) -> int:
    """Return how many different values a column has, without missing ones."""
    return len(set(_written(values)))


def _mean_length(values: pd.Series) -> float:
    """Return how many characters a value has on average, without missing ones."""
    written = _written(values)
    return sum(map(len, written)) / max(len(written), 1)
