"""The comparison table as text: for a terminal, for `report.md`, and cell by cell for the page."""

import math
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_dist.admission.evaluation import checked_table
from post_dist.admission.quarantine import quarantined
from post_dist.artifacts.card import markdown_text, plain
from post_dist.artifacts.evaluation_table import DP_REGRESSION, MAJORITY, TF_IDF

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH = 130
"""Width of a printed table in characters. The widest table needs this many."""
_CLASS_COLUMNS = {
    "accuracy %": "accuracy_micro",
    "95% interval": "interval_95",
    "macro %": "accuracy_macro",
    "AUC %": "auc",
}
_RESPONSE_COLUMNS = {
    "exact match %": "exact_match",
    "95% interval": "interval_95",
    "ROUGE-1 %": "rouge_1",
    "ROUGE-L %": "rouge_l",
}
_WITHOUT_PROMPT = ("zero-shot", "student")
NOTE = (
    "Accuracy counts examples (micro) or averages the recall of the classes (macro). "
    "AUC takes one class against the rest and depends on the ranking alone. "
    "An exact match is word for word; ROUGE is F1 with stemming. The interval is Wilson's."
)


def read_table(evaluation: Path) -> dict[str, Any]:
    """Read the table of an evaluation's run folder, as `post-dist evaluate --json` prints it.

    Raises:
        ArtifactRefused: the folder is not what `evaluate` has written. It may come from another
            party.
    """
    with quarantined(evaluation / "artifact") as inside:
        return checked_table(inside)


def has_classes(table: Mapping[str, Any]) -> bool:
    """Return whether the task has classes; the other tasks generate text."""
    return "accuracy_micro" in table["rows"][0]


def measured_field(table: Mapping[str, Any]) -> str:
    """Return the field of a row that charts and verdicts compare."""
    return "accuracy_micro" if has_classes(table) else "exact_match"


def table_title(table: Mapping[str, Any]) -> str:
    """Return a title with the task and the split.

    If the test split was read more than once, the title says how often.
    """
    title = f"{table['task']}, {table['split']} split"
    readings = table.get("test_readings", 1)
    if readings > 1:
        title += f" (read {readings} times)"
    return title


def cautions(table: Mapping[str, Any]) -> list[str]:
    """Return why the prompts of a table may be worth less than their accuracy, as sentences.

    The split may have one class only. Or the majority class, or a classifier without a language
    model, is at least as good as every prompt. Of such classifiers, the private one is named.
    """
    sentences = []
    # AUC needs two classes, so every row of such a split lacks it.
    if has_classes(table) and all(row["auc"] is None for row in table["rows"]):
        sentences.append(
            "All examples of this split have one class, so no accuracy tells what was learned."
        )
    # What the table shows as equal is equal.
    field = measured_field(table)
    shown = {row["name"]: round(100 * row[field], 1) for row in table["rows"]}
    classifiers = [name for name in shown if name.startswith((TF_IDF, DP_REGRESSION))]
    without_prompt = {*_WITHOUT_PROMPT, MAJORITY, *classifiers}
    best = max((shown[name] for name in shown if name not in without_prompt), default=math.inf)
    as_good = [name for name in shown if name in (MAJORITY, *classifiers) and shown[name] >= best]
    # The private ones come last in a table, and say more.
    named = [name for name in as_good if name == MAJORITY or name == as_good[-1]]
    for name in named:
        whose = f"The {name}" if name == MAJORITY else name
        place = "ahead of every prompt" if shown[name] > best else "as good as the best prompt"
        sentences.append(f"{whose} is {place}, with {shown[name]}%.")
    return sentences


def table_columns(table: Mapping[str, Any]) -> list[str]:
    """Return the headings of the columns."""
    return list(_fields_by_column(table))


def table_cells(table: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the text of all cells, row by row."""
    fields = _fields_by_column(table)
    rows = []
    for row in table["rows"]:
        cells = [_cell(column, row[field]) for column, field in fields.items()]
        rows.append(tuple(cells))
    return rows


def terminal_table(table: Mapping[str, Any]) -> "Table":
    """Return the table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    # A plain string would be read as markup, where brackets have a meaning.
    caption = "\n".join(cautions(table)) or None
    drawn = Table(title=Text(plain(table_title(table))), caption=caption)
    for column in table_columns(table):
        justify = "left" if column == "row" else "right"
        drawn.add_column(column, justify=justify, no_wrap=True)
    for cells in table_cells(table):
        drawn.add_row(*(Text(plain(cell)) for cell in cells))
    return drawn


def table_text(table: Mapping[str, Any]) -> str:
    """Return the terminal's table as plain text."""
    from rich.console import Console

    text = StringIO()
    Console(file=text, width=_WIDTH).print(terminal_table(table))
    return text.getvalue().rstrip("\n")


def markdown_table(table: Mapping[str, Any]) -> str:
    """Return the table in Markdown."""
    columns = table_columns(table)
    lines = [_markdown_row(columns), "|" + "---|" * len(columns)]
    lines += [_markdown_row(cells) for cells in table_cells(table)]
    return "\n".join(lines)


def print_wide(table: "Table") -> None:
    """Print a table at full width, even on a narrow terminal."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, _WIDTH)
    console.print(table)


def _fields_by_column(table: Mapping[str, Any]) -> dict[str, str]:
    """Return which field of a row each column holds, by the column's heading."""
    # The order here is the order of the columns.
    measured = _CLASS_COLUMNS if has_classes(table) else _RESPONSE_COLUMNS
    return {"row": "name", **measured, "n": "n", "epsilon": "epsilon"}


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        low, high = value
        return f"{100 * low:.1f} to {100 * high:.1f}"
    if column.endswith("%"):
        return f"{100 * value:.1f}"
    if isinstance(value, float):
        return f"{value:.2f}"
    return str(value)


def _markdown_row(cells: "list[str] | tuple[str, ...]") -> str:
    return f"| {' | '.join(map(markdown_text, cells))} |"
