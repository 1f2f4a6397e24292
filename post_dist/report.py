"""What a finished pipeline looks like: the table on a terminal, `report.md`, and one HTML page with figures inside."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from post_dist.errors import InputError
from post_dist.runtime.metric_log import read_metric_log

_OF_CLASSES = {
    "accuracy %": "accuracy_micro",
    "95% interval": "interval_95",
    "macro %": "accuracy_macro",
    "AUC %": "auc",
}
_OF_RESPONSES = {
    "exact match %": "exact_match",
    "95% interval": "interval_95",
    "ROUGE-1 %": "rouge_1",
    "ROUGE-L %": "rouge_l",
}
_NOTE = (
    "Accuracy counts rows (micro) or averages the classes' recalls (macro); AUC, one class against the rest, sees the ranking alone. "
    "An exact match is word for word; ROUGE is F1 with stemming. The interval is Wilson's."
)


def read_table(evaluation: Path) -> dict[str, Any]:
    """The object of an evaluation's run folder, as `post-dist evaluate --json` prints it."""
    table: dict[str, Any] = json.loads((evaluation / "artifact" / "table.json").read_text())
    return table


def finished_evaluation(runs: Path) -> Path:
    """The run folder of the newest evaluation among those of one run's stages.

    Raises:
        InputError: none is finished.
    """
    tables = sorted(
        runs.glob("evaluate-*/artifact/table.json"), key=lambda path: path.stat().st_mtime
    )
    if not tables:
        raise InputError(
            f"{runs} holds no finished evaluation",
            "give the folder runs/NAME that `post-dist pipeline` has written",
        )
    return tables[-1].parent.parent


def shown_table(table: dict[str, Any]) -> Table:
    """The table for a terminal."""
    shown = Table(title=_title(table))
    for column in _columns(table):
        shown.add_column(column, justify="left" if column == "row" else "right", no_wrap=True)
    for cells in _cells(table):
        shown.add_row(*cells)
    return shown


def write_report(evaluation: Path) -> Path:
    """Write `report.md` and `report.html` beside the stage folders.

    Returns:
        The path of the HTML page.
    """
    table, runs = read_table(evaluation), evaluation.parent
    title = f"{runs.name}: {_title(table)}"
    columns = _columns(table)
    header = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in _cells(table))
    (runs / "report.md").write_text(f"# {title}\n\n{header}\n{lines}\n\n{_NOTE}\n")
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
        for cells in _cells(table)
    )
    figures = "".join(
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{png}"></figure>'
        for name, png in _figures(runs, table)
    )
    page = _PAGE.format(
        title=html.escape(title),
        header="".join(f"<th>{column}</th>" for column in columns),
        rows=rows,
        note=_NOTE,
        figures=figures,
    )
    path = runs / "report.html"
    path.write_text(page)
    return path


def _title(table: dict[str, Any]) -> str:
    readings = table.get("test_readings", 1)
    return f"{table['task']}, {table['split']} split" + (
        f" (read {readings} times)" if readings > 1 else ""
    )


def _columns(table: dict[str, Any]) -> dict[str, str]:
    """By the column's name, what of a row it shows."""
    return {
        "row": "name",
        **(_OF_CLASSES if "accuracy_micro" in table["rows"][0] else _OF_RESPONSES),
        "n": "n",
        "epsilon": "epsilon",
    }


def _cells(table: dict[str, Any]) -> list[tuple[str, ...]]:
    columns = _columns(table)
    return [
        tuple(_cell(name, row[field]) for name, field in columns.items()) for row in table["rows"]
    ]


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return f"{100 * value[0]:.1f} to {100 * value[1]:.1f}"
    if column.endswith("%"):
        return f"{100 * value:.1f}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _figures(runs: Path, table: dict[str, Any]) -> list[tuple[str, str]]:
    """The accuracies with their intervals, and the loss curves of the provider's stages; a name and a PNG each."""
    from matplotlib.figure import Figure  # slow to import

    figures = []
    bars = Figure(figsize=(7, 0.45 * len(table["rows"]) + 1), layout="constrained")
    axes = bars.subplots()
    names = [row["name"] for row in table["rows"]]
    of_classes = "accuracy_micro" in table["rows"][0]
    values = [row["accuracy_micro" if of_classes else "exact_match"] for row in table["rows"]]
    low = [value - row["interval_95"][0] for value, row in zip(values, table["rows"], strict=True)]
    high = [row["interval_95"][1] - value for value, row in zip(values, table["rows"], strict=True)]
    axes.errorbar(values, names, xerr=[low, high], fmt="o", capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel(f"{'accuracy' if of_classes else 'exact match'} with its 95% interval")
    figures.append(("accuracy", _png(bars)))
    for path in sorted(runs.glob("*/metrics.jsonl")):
        lines = read_metric_log(path)
        curves = Figure(figsize=(7, 2.5), layout="constrained")
        axes = curves.subplots()
        for key in ("loss", "ce", "lm", "cos"):
            if lines and key in lines[0]:
                axes.plot(
                    [line["step"] for line in lines], [line[key] for line in lines], label=key
                )
        axes.set_title(path.parent.name, fontsize=10)
        axes.set_xlabel("step")
        axes.legend()
        figures.append((path.parent.name, _png(curves)))
    return figures


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ padding: .35rem .6rem; border-bottom: 1px solid #ddd; text-align: right }}
td:first-child, th:first-child {{ text-align: left }}
figure {{ margin: 1.5rem 0 }}
img {{ max-width: 100% }}
</style>
<h1>{title}</h1>
<table><tr>{header}</tr>{rows}</table>
<p>{note}</p>
{figures}
</html>
"""
