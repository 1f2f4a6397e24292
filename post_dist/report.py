"""What a finished pipeline looks like: the table on a terminal, `report.md`, and one HTML page with figures inside."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from post_dist.artifacts.run_folder import RunFolder
from post_dist.runtime.metrics import read_metrics

_COLUMNS = ("row", "accuracy %", "95% interval", "macro %", "AUC %", "n", "epsilon")
_TABLE_WIDTH = 130
_NOTE = (
    "Accuracy counts rows (micro) or averages the classes' recalls (macro); the interval is Wilson's. "
    "AUC, one class against the rest, sees the ranking alone."
)


def read_table(evaluation: RunFolder) -> dict[str, Any]:
    """The evaluation's object, as `post-dist evaluate --json` prints it."""
    table: dict[str, Any] = json.loads((evaluation.artifact / "table.json").read_text())
    return table


def print_table(table: dict[str, Any]) -> None:
    """Show the table on standard output."""
    shown = Table(title=_title(table))
    for column in _COLUMNS:
        shown.add_column(column, justify="left" if column == "row" else "right", no_wrap=True)
    for cells in _cells(table):
        shown.add_row(*cells)
    console = Console()
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(shown)


def write_report(evaluation: RunFolder) -> Path:
    """Write `report.md` and `report.html` beside the stage folders.

    Returns:
        The path of the HTML page.
    """
    table, runs = read_table(evaluation), evaluation.path.parent
    title = f"{runs.name}: {_title(table)}"
    header = f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}"
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in _cells(table))
    (runs / "report.md").write_text(f"# {title}\n\n{header}\n{lines}\n\n{_NOTE}\n")
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>" for cells in _cells(table))
    figures = "".join(
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{png}"></figure>' for name, png in _figures(runs, table)
    )
    page = _PAGE.format(
        title=html.escape(title),
        header="".join(f"<th>{column}</th>" for column in _COLUMNS),
        rows=rows,
        note=_NOTE,
        figures=figures,
    )
    path = runs / "report.html"
    path.write_text(page)
    return path


def _title(table: dict[str, Any]) -> str:
    readings = table.get("test_readings", 1)
    return f"{table['task']}, {table['split']} split" + (f" (read {readings} times)" if readings > 1 else "")


def _cells(table: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            row["name"],
            f"{100 * row['accuracy_micro']:.1f}",
            f"{100 * row['interval_95'][0]:.1f} to {100 * row['interval_95'][1]:.1f}",
            f"{100 * row['accuracy_macro']:.1f}",
            "none" if row["auc"] is None else f"{100 * row['auc']:.1f}",
            str(row["n"]),
            "none" if row["epsilon"] is None else f"{row['epsilon']:.2f}",
        )
        for row in table["rows"]
    ]


def _figures(runs: Path, table: dict[str, Any]) -> list[tuple[str, str]]:
    """The accuracies with their intervals, and the loss curves of the provider's stages; a name and a PNG each."""
    from matplotlib.figure import Figure  # slow to import

    figures = []
    bars = Figure(figsize=(7, 0.45 * len(table["rows"]) + 1), layout="constrained")
    axes = bars.subplots()
    names = [row["name"] for row in table["rows"]]
    values = [row["accuracy_micro"] for row in table["rows"]]
    low = [row["accuracy_micro"] - row["interval_95"][0] for row in table["rows"]]
    high = [row["interval_95"][1] - row["accuracy_micro"] for row in table["rows"]]
    axes.errorbar(values, names, xerr=[low, high], fmt="o", capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy with its 95% interval")
    figures.append(("accuracy", _png(bars)))
    for path in sorted(runs.glob("*/metrics.jsonl")):
        lines = read_metrics(path)
        curves = Figure(figsize=(7, 2.5), layout="constrained")
        axes = curves.subplots()
        for key in ("loss", "ce", "lm", "cos"):
            if lines and key in lines[0]:
                axes.plot([line["step"] for line in lines], [line[key] for line in lines], label=key)
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
