"""The labels of a table, and how many texts or users have them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from post_dist.config.label_names import MOST_LABEL_CHARACTERS, label_fault
from post_dist.config.sources import Task
from post_dist.data.tasks import AnsweredRow, answered_rows, plain_label, undisputed
from post_dist.draft.columns import MOST_CLASSES, Columns
from post_dist.errors import InputError

FEWEST_OF_LABEL = 10
"""Fewest texts, or users, of a label that `init` publishes.

The validation and the test split have a tenth each. Of fewer, they have less than one on average,
so nobody could tell whether the class was learned. But its name would tell that somebody has it.
"""
_FEWEST_UNITS = 100
"""With fewer texts, or users, delta would be above the 0.01 that `verify` accepts."""


@dataclass(frozen=True)
class Labels:
    """The labels of a table, in a fixed order.

    Attributes:
        common: labels that `FEWEST_OF_LABEL` texts have, or users if there are any.
        rare: the others.
        number_of_units: how many texts have a label, or users.
    """

    common: list[str]
    rare: list[str]
    number_of_units: int


def read_labels(data: Path, columns: Columns) -> Labels:
    """Read the labels of a table, and count the examples that the stages would use.

    Raises:
        InputError: a value cannot be a label, there are too few or too many labels, or too few
            texts or users have one.
    """
    section = Task(
        name="draft",
        visibility="private",
        path=data.resolve(),
        text=f"{{{columns.text}}}",
        label_column=columns.label,
        user_column=columns.user,
    )
    rows = []
    for row in answered_rows(section, "train", "--data"):
        rows.append(replace(row, written=plain_label(row.written)))
    # A label of disputed texts alone counts as rare: the stages refuse a row with an unknown label.
    labels = _labels_of(rows, columns.label)
    label_of = undisputed((row.user, row.text, row.written) for row in rows)
    # What epsilon protects: a text, or a user with all texts.
    pairs = {(label, user or text) for (user, text), label in label_of.items()}
    number_of_units = len({unit for _, unit in pairs})
    if number_of_units < _FEWEST_UNITS:
        raise InputError(
            f"--data: {data.name} has fewer than {_FEWEST_UNITS} {columns.units} with a label",
            "a private run needs more; a text with two different labels does not count",
        )
    count_of = Counter(label for label, _ in pairs)
    common = [label for label in labels if count_of[label] >= FEWEST_OF_LABEL]
    if len(common) < 2:
        raise InputError(
            f"--label: fewer than 2 values of column '{columns.label}' have {FEWEST_OF_LABEL} "
            f"{columns.units} or more",
            "is it the column of the labels? If it is, merge labels, or add examples",
        )
    rare = [label for label in labels if label not in common]
    return Labels(common, rare, number_of_units)


def _labels_of(rows: Sequence[AnsweredRow], column: str) -> list[str]:
    """Return the labels of rows in a fixed order.

    Raises:
        InputError: there are too few or too many, or one cannot be handed on with a prompt.
    """
    labels = sorted({row.written for row in rows})
    if not 2 <= len(labels) <= MOST_CLASSES:
        raise InputError(
            f"--label: column '{column}' has {len(labels)} different values, and a task has 2 to "
            f"{MOST_CLASSES} classes",
            "is it the column of the labels?",
        )
    for row in rows:
        fault = label_fault(row.written)
        if fault is not None:
            raise InputError(
                f"--label: the value of column '{column}' in row {row.number} {fault}",
                f"change it in your table: a label is at most {MOST_LABEL_CHARACTERS} printable "
                "characters",
            )
    return labels
