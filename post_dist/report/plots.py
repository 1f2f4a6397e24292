"""The plots of the report page, as PNG images that are embedded in the page."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_dist.report.tables import has_classes
from post_dist.runtime.metric_log import read_metric_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 110


@dataclass(frozen=True)
class Plot:
    """One image.

    Attributes:
        name: what the plot shows; the alternative text of the image.
        png: the image in base64.
    """

    name: str
    png: str


def page_plots(runs: Path, table: Mapping[str, Any]) -> list[Plot]:
    """Draw the accuracies with their intervals, and the loss curves of the provider's stages.

    Args:
        runs: the folder of one run file, with a folder for each of its stages.
        table: the table of the evaluation (see `read_table`).
    """
    # The owner's metric logs have another name and stay out: the other party may see the page.
    plots = [accuracy_plot(table)]
    for path in sorted(runs.glob("*/metrics.jsonl")):
        plots.append(loss_plot(path.parent.name, read_metric_log(path)))
    return plots


def accuracy_plot(table: Mapping[str, Any]) -> Plot:
    """Draw one point with its interval for each row of the table."""
    from matplotlib.figure import Figure  # slow to import

    rows = table["rows"]
    field = "exact_match"
    label = "exact match"
    if has_classes(table):
        field = "accuracy_micro"
        label = "accuracy"
    # matplotlib wants the lengths of the two arms of each interval.
    values = [row[field] for row in rows]
    below = [row[field] - row["interval_95"][0] for row in rows]
    above = [row["interval_95"][1] - row[field] for row in rows]

    figure = Figure(figsize=(7, 0.45 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    names = [row["name"] for row in rows]
    axes.errorbar(values, names, xerr=[below, above], fmt="o", capsize=3)
    # The table's first row comes at the top.
    axes.invert_yaxis()
    axes.set_xlabel(f"{label} with its 95% interval")
    return Plot("accuracy", _png(figure))


def loss_plot(name: str, lines: Sequence[Mapping[str, Any]]) -> Plot:
    """Draw the loss of a stage, and its terms, against the step."""
    from matplotlib.figure import Figure

    from post_dist.losses.terms import METRIC_LABELS  # loads torch

    figure = Figure(figsize=(7, 2.5), layout="constrained")
    axes = figure.subplots()
    # Stages log different terms, so a curve is drawn only if the log has it.
    steps = [line["step"] for line in lines]
    for metric, label in METRIC_LABELS.items():
        if lines and metric in lines[0]:
            axes.plot(steps, [line[metric] for line in lines], label=label)
    axes.set_title(name, fontsize=10)
    axes.set_xlabel("step")
    axes.legend()
    return Plot(name, _png(figure))


def _png(figure: "Figure") -> str:
    image = BytesIO()
    figure.savefig(image, format="png", dpi=_DOTS_PER_INCH)
    return base64.b64encode(image.getvalue()).decode()
