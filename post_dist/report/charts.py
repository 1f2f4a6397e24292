"""The charts of the page, as inline SVG that needs no script.

Horizontal positions are shares of the width, so a chart fits a phone and a wide screen, and its
text keeps its size. Curves are drawn in an inner `svg` that is stretched.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from post_dist.artifacts.card import plain
from post_dist.report.tables import measured_field

_ROW_HEIGHT = 46
_CURVE_HEIGHT = 120
_POINTS = 300
"""A curve with more steps is averaged over neighbors."""
_SMOOTHING = 0.85
"""Share of the earlier value in a smoothed curve."""
_MOST_COLORS = 4


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: its name in the legend.
        points: pairs of a horizontal and a vertical value.
    """

    name: str
    points: Sequence[tuple[float, float]]

    @property
    def last(self) -> str:
        """Its last value, for the legend."""
        return f"{self.points[-1][1]:.3g}"


@dataclass(frozen=True)
class Chart:
    """A drawing with its legend.

    Attributes:
        title: what it shows.
        svg: the drawing.
        series: its lines, in the order of their colors.
    """

    title: str
    svg: Markup
    series: Sequence[Series] = ()


@dataclass(frozen=True)
class Reference:
    """A value to compare with, drawn as a dashed line over the whole chart."""

    name: str
    value: float


class _Scale:
    """Maps shares between 0 and 1 to positions in percent, with round ticks.

    Args:
        values: all values that must be visible.
    """

    def __init__(self, values: Sequence[float]) -> None:
        low, high = min(values), max(values)
        room = max(high - low, 0.02)
        # The room on the right holds the value beside the longest interval.
        self._low = low - 0.06 * room
        self._high = high + 0.22 * room
        self._tick = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if room <= 7 * step)

    def at(self, value: float) -> float:
        """Return the position of a value, in percent."""
        return 100 * (value - self._low) / (self._high - self._low)

    def ticks(self) -> list[float]:
        """Return the round values that are visible, at most 1."""
        first = math.ceil(self._low / self._tick)
        last = math.floor(min(self._high, 1.0) / self._tick)
        ticks = [count * self._tick for count in range(first, last + 1)]
        # A label at the very edge would be cut.
        return [tick for tick in ticks if 4 < self.at(tick) < 96]


def percent(share: float) -> str:
    """Return a share in percent, as everywhere on the page."""
    return f"{100 * share:.1f}%"


def interval_chart(
    table: Mapping[str, Any],
    notes: Mapping[str, str],
    references: Sequence[Reference],
    highlighted: str,
) -> Chart:
    """Draw each row of the table as a point with its 95% interval.

    Args:
        table: the table of the evaluation.
        notes: a few words on each row, by its name.
        references: values to compare with.
        highlighted: name of the row that the page is about.
    """
    field = measured_field(table)
    rows = table["rows"]
    values = [reference.value for reference in references]
    for row in rows:
        values += row["interval_95"]
    scale = _Scale(values)
    bottom = _ROW_HEIGHT * len(rows) + 8

    parts = [_vertical(scale.at(tick), bottom, f"{100 * tick:.0f}%") for tick in scale.ticks()]
    for row_number, reference in enumerate(references):
        parts.append(_reference(reference, scale.at(reference.value), bottom, row_number))
    for row_number, row in enumerate(rows):
        name = row["name"]
        kind = "hit" if name == highlighted else "other"
        low, high = row["interval_95"]
        line = _ROW_HEIGHT * row_number + 32
        parts.append(_row_label(name, notes.get(name, ""), kind, line - 12))
        parts.append(
            Markup(
                '<line class="ci {0}" x1="{1:.2f}%" x2="{2:.2f}%" y1="{3}" y2="{3}"/>'
                '<circle class="{0}" cx="{4:.2f}%" cy="{3}" r="6"/>'
                '<text class="value {0}" x="{2:.2f}%" y="{5}" dx="10">{6}</text>'
            ).format(kind, scale.at(low), scale.at(high), line, scale.at(row[field]), line + 4,
                     percent(row[field]))
        )  # fmt: skip
    described = "; ".join(f"{row['name']} {percent(row[field])}" for row in rows)
    title = f"{field_title(table)} with its 95% interval"
    svg = _svg(f"{title}: {described}", bottom + 22 + 15 * len(references), parts)
    return Chart(title, svg)


def privacy_chart(table: Mapping[str, Any], reference: Reference | None) -> Chart | None:
    """Draw the rows that exist at several epsilons against epsilon, or return None without any."""
    groups = _groups_by_epsilon(table)
    if not groups:
        return None
    epsilons = {epsilon for points in groups.values() for epsilon in points}
    # The weakest privacy is on the left. Equal distances suit values such as 1, 8 and infinity.
    order = sorted(epsilons, reverse=True)
    step = 80 / max(len(order) - 1, 1)
    places = {epsilon: 10 + step * place for place, epsilon in enumerate(order)}

    series = []
    values = [] if reference is None else [reference.value]
    for name, points in groups.items():
        placed = [(places[epsilon], points[epsilon]) for epsilon in order if epsilon in points]
        series.append(Series(name, placed))
        values += points.values()
    scale = _Scale(values)

    def height(value: float) -> float:
        return _CURVE_HEIGHT * (1 - scale.at(value) / 100) + 20

    parts = [_horizontal(height(tick), f"{100 * tick:.0f}%") for tick in scale.ticks()]
    if reference is not None:
        line = '<line class="reference" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>'
        label = '<text class="tick" x="0" y="{1:.1f}">{2}</text>'
        place = height(reference.value)
        parts.append(Markup(line + label).format(place, place - 4, plain(reference.name)))
    for color, each in enumerate(series):
        parts.append(_line(each, color, lambda value: 100 * height(value) / 170, 0, 170))
        for x, value in each.points:
            dot = '<circle class="c{}" cx="{:.2f}%" cy="{:.1f}" r="4"/>'
            parts.append(Markup(dot).format(color % _MOST_COLORS, x, height(value)))
    for epsilon, x in places.items():
        label = "no DP" if math.isinf(epsilon) else f"ε = {epsilon:.3g}"
        mark = '<text class="tick" x="{:.2f}%" y="184" text-anchor="middle">{}</text>'
        parts.append(Markup(mark).format(x, label))
    title = f"{field_title(table)} against ε"
    return Chart(title, _svg(_described(title, series), 190, parts), series)


def loss_chart(
    title: str, lines: Sequence[Mapping[str, Any]], labels: Mapping[str, str]
) -> Chart | None:
    """Draw the losses of a stage against the step, or return None if the log holds none.

    Args:
        title: name of the stage.
        lines: the lines of its metrics file.
        labels: the name of each loss, by its metric. Other metrics are not drawn.
    """
    series = []
    for metric, label in labels.items():
        points = _finite_points(lines, metric)
        if points:
            series.append(Series(label, _smoothed(points)))
    if not series:
        return None
    raw = [_finite_points(lines, metric) for metric in labels]
    highest = max(value for points in raw for _, value in points) or 1.0
    steps = max(step for points in raw for step, _ in points) or 1.0

    def height(value: float) -> float:
        return 100 * (1 - value / highest)

    parts = [
        _horizontal(14, f"{highest:.3g}"),
        _horizontal(14 + _CURVE_HEIGHT / 2, f"{highest / 2:.3g}"),
        _horizontal(14 + _CURVE_HEIGHT, ""),
    ]
    for color, each in enumerate(series):
        shares = [(100 * step / steps, value) for step, value in each.points]
        parts.append(_line(Series(each.name, shares), color, height, 14, _CURVE_HEIGHT))
    ends = (
        '<text class="tick" x="0" y="150">step 1</text>'
        '<text class="tick" x="100%" y="150" text-anchor="end">step {:.0f}</text>'
    )
    parts.append(Markup(ends).format(steps + 1))
    return Chart(title, _svg(_described(f"{title}: loss by step", series), 156, parts), series)


def field_title(table: Mapping[str, Any]) -> str:
    """Return the name of the metric that the charts show."""
    return "Accuracy" if measured_field(table) == "accuracy_micro" else "Exact match"


def _groups_by_epsilon(table: Mapping[str, Any]) -> dict[str, dict[float, float]]:
    """Return the metric by epsilon, infinite without privacy, of each row that has several."""
    field = measured_field(table)
    groups: dict[str, dict[float, float]] = {}
    for row in table["rows"]:
        epsilon = math.inf if row["epsilon"] is None else row["epsilon"]
        # Rows of one prompt variant end with its epsilon.
        name = row["name"].partition(", epsilon ")[0]
        groups.setdefault(name, {})[epsilon] = row[field]
    return {name: points for name, points in groups.items() if len(points) > 1}


def _finite_points(lines: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[float, float]]:
    """Return step and value of each line. A skipped step has no finite loss."""
    points = []
    for line in lines:
        value = line.get(metric)
        if isinstance(value, int | float) and math.isfinite(value):
            points.append((float(line["step"]), float(value)))
    # A long run would make a page of many megabytes.
    width = math.ceil(len(points) / _POINTS)
    averaged = []
    for start in range(0, len(points), max(width, 1)):
        group = points[start : start + width]
        mean = sum(value for _, value in group) / len(group)
        averaged.append((group[-1][0], mean))
    return averaged


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the moving average of a curve. A curve of a few points stays as it is."""
    if len(points) < 1 / (1 - _SMOOTHING):
        return list(points)
    smooth = []
    total = 0.0
    weight = 0.0
    for step, value in points:
        # Without the weight, the first value would dominate the start.
        total = _SMOOTHING * total + value
        weight = _SMOOTHING * weight + 1
        smooth.append((step, total / weight))
    return smooth


def _svg(described: str, height: float, parts: Sequence[Markup]) -> Markup:
    """Return a drawing as wide as its place, with a text that describes it."""
    start = '<svg role="img" aria-label="{0}" width="100%" height="{1:.0f}"><title>{0}</title>{2}'
    return Markup(start + "</svg>").format(plain(described), height, Markup("").join(parts))


def _described(title: str, series: Sequence[Series]) -> str:
    """Return the text alternative of a chart with lines."""
    ends = [f"{each.name} from {each.points[0][1]:.3g} to {each.last}" for each in series]
    return f"{title}; {'; '.join(ends)}"


def _vertical(x: float, bottom: float, label: str) -> Markup:
    line = '<line class="grid" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="{1}"/>'
    text = '<text class="tick" x="{0:.2f}%" y="{2}" text-anchor="middle">{3}</text>'
    return Markup(line + text).format(x, bottom, bottom + 16, label)


def _horizontal(y: float, label: str) -> Markup:
    line = '<line class="grid" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>'
    # Losses fall, so the upper right of a chart is free.
    text = '<text class="tick" x="100%" y="{1:.1f}" text-anchor="end">{2}</text>'
    return Markup(line + text).format(y, y - 3, label)


def _reference(reference: Reference, x: float, bottom: float, row: int) -> Markup:
    """Draw a dashed vertical line, with its name on a line of its own below the ticks."""
    anchor = "start" if x < 50 else "end"
    line = '<line class="reference" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="{1}"/>'
    text = '<text class="tick" x="{0:.2f}%" y="{2}" text-anchor="{3}">{4}</text>'
    below = bottom + 32 + 15 * row
    return Markup(line + text).format(x, bottom, below, anchor, plain(reference.name))


def _row_label(name: str, note: str, kind: str, y: float) -> Markup:
    text = '<text class="name {}" x="0" y="{}">{}<tspan class="note" dx="8">{}</tspan></text>'
    return Markup(text).format(kind, y, plain(name), plain(note))


def _line(series: Series, color: int, height: Any, top: float, tall: float) -> Markup:
    """Draw a line in an inner drawing of 100 by 100 that is stretched to its place.

    Args:
        series: horizontal values in percent, and vertical ones.
        color: number of the color.
        height: maps a vertical value to percent of the inner height.
        top: upper edge of the place, in pixels.
        tall: height of the place, in pixels.
    """
    corners = " ".join(f"{x:.2f},{height(value):.2f}" for x, value in series.points)
    line = (
        '<svg x="0" y="{}" width="100%" height="{}" viewBox="0 0 100 100" aria-hidden="true" '
        'preserveAspectRatio="none"><polyline class="line c{}" points="{}"/></svg>'
    )
    return Markup(line).format(top, tall, color % _MOST_COLORS, corners)
