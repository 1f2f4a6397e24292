"""The scaling of a step with the number of GPUs, planned or measured.

Strong scaling keeps the batch size. Weak scaling keeps each GPU's part of the batch. A row has
`scaling`, `gpus` and `conflicts`. For distill and transfer it also has the seconds of a step and
the efficiency: the rate per GPU, divided by the rate per GPU on the fewest GPUs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from post_dist.config.precision import Precision
from post_dist.config.schema import RunConfig
from post_dist.errors import InputError
from post_dist.files import make_folder, writing
from post_dist.models.size import ModelSize
from post_dist.planning.hardware import Machine
from post_dist.planning.measurement import Measurement, read_measurement
from post_dist.planning.plan import plan_run

_RATES = {"distill": "tokens_per_second", "transfer": "samples_per_second"}
_Scaling = Literal["strong", "weak"]
_SCALINGS: tuple[_Scaling, ...] = ("strong", "weak")
_Numbers = dict[str, Any]
_Row = dict[str, Any]


@dataclass(frozen=True)
class _Point:
    """The stages on one number of GPUs.

    Attributes:
        gpus: number of GPUs.
        stages: for each stage the numbers of a step, planned or measured.
    """

    gpus: int
    stages: dict[str, _Numbers]


def planned(
    config: RunConfig,
    teacher: ModelSize,
    machine: Machine,
    precision: Precision,
    gpus: Sequence[int],
) -> list[_Row]:
    """Plan a run on several numbers of GPUs.

    Args:
        config: the run file.
        teacher: size of the large model.
        machine: kind of GPU, and how many a node has.
        precision: precision of weights and activations.
        gpus: the numbers of GPUs.

    Returns:
        The rows of strong scaling, then those of weak scaling.

    Raises:
        InputError: a number exceeds one node and is not a multiple of a node's GPUs.
    """
    # A number of GPUs is a part of one node, or several whole nodes.
    in_node = machine.gpus_per_node
    uneven = [count for count in gpus if count > in_node and count % in_node]
    if uneven:
        raise InputError(
            f"--sweep: {uneven[0]} GPUs are not whole nodes of {in_node}",
            f"choose multiples of {in_node}, or less than {in_node}",
        )
    rows: list[_Row] = []
    for scaling in _SCALINGS:
        points = []
        for count in sorted(gpus):
            nodes = -(-count // in_node)
            of_node = min(count, in_node)
            place = replace(machine, nodes=nodes, gpus_per_node=of_node, nodes_of_stage={})
            # Weak scaling grows the batch with the number of GPUs.
            times = 1.0 if scaling == "strong" else place.ranks / min(gpus)
            plan = plan_run(grown(config, times), teacher, place, precision)
            by_name = {stage["stage"]: stage for stage in plan["stages"]}
            points.append(_Point(place.ranks, by_name))
        rows += _rows(scaling, points, _planned_conflicts)
    return rows


def measured(files: Sequence[Path]) -> list[_Row]:
    """Merge measurements of one run file on several numbers of GPUs.

    Args:
        files: files that `bench scale --write` wrote.

    Returns:
        The rows of strong scaling, then those of weak scaling.

    Raises:
        InputError: a file is not such a measurement, or two are of equally many GPUs.
    """
    found: dict[int, Measurement] = {}
    for file in files:
        measurement = read_measurement(file)
        if measurement.ranks in found:
            raise InputError(
                f"{file} is a second measurement on {measurement.ranks} GPUs",
                "give one file for each number of GPUs",
            )
        found[measurement.ranks] = measurement
    rows: list[_Row] = []
    for scaling in _SCALINGS:
        points = [_measured_point(found[ranks], scaling) for ranks in sorted(found)]
        rows += _rows(scaling, points, _stragglers)
    return rows


def _measured_point(measurement: Measurement, scaling: _Scaling) -> _Point:
    """Pick the rows of one kind of scaling from a file."""
    stages: dict[str, _Numbers] = {}
    for row in measurement.rows:
        # On one rank, weak and strong scaling are equal and measured once.
        if row.scaling == scaling or measurement.ranks == 1:
            stages[row.stage] = row.model_dump()
    return _Point(measurement.ranks, stages)


def _planned_conflicts(stage: str, numbers: _Numbers) -> list[str]:
    """Return the conflicts of a planned stage."""
    return list(numbers["conflicts"])


def _stragglers(stage: str, numbers: _Numbers) -> list[str]:
    """Name the straggler of a measured stage, if there was one."""
    return [f"{stage}: straggler {numbers['straggler']}"] if numbers["straggler"] else []


def _rows(
    scaling: _Scaling,
    points: Sequence[_Point],
    conflicts: Callable[[str, _Numbers], list[str]],
) -> list[_Row]:
    """Make a row for each number of GPUs. The efficiency is relative to the first."""
    # The point with the fewest GPUs comes first, and all others are compared with it.
    first = points[0]
    rows = []
    for point in points:
        row: _Row = {"scaling": scaling, "gpus": point.gpus, "conflicts": []}
        for stage, rate in _RATES.items():
            numbers = point.stages[stage]
            speedup = numbers[rate] / first.stages[stage][rate]
            row[f"{stage}_step_seconds"] = numbers["step_seconds"]
            row[f"{stage}_efficiency"] = speedup * first.gpus / point.gpus
            row["conflicts"] += conflicts(stage, numbers)
        rows.append(row)
    return rows


def scaling_lines(rows: Sequence[_Row]) -> list[str]:
    """Write each row as a line of text."""
    lines = []
    for row in rows:
        steps = []
        for stage in _RATES:
            seconds = row[f"{stage}_step_seconds"]
            efficiency = row[f"{stage}_efficiency"]
            steps.append(f"{stage} {seconds:.4g} s a step ({efficiency:.0%})")
        head = f"{row['scaling']} scaling, {row['gpus']} GPUs: {', '.join(steps)}"
        lines.append("; ".join([head, *row["conflicts"]]))
    return lines


def grown(config: RunConfig, times: float) -> RunConfig:
    """Return the run with larger batches in distill and transfer.

    Args:
        config: the run file.
        times: factor of the batch sizes.
    """
    sections = {}
    for name in _RATES:
        section = getattr(config, name)
        batch_size = round(section.batch_size * times)
        sections[name] = section.model_copy(update={"batch_size": batch_size})
    return config.model_copy(update=sections)


def draw(rows: Sequence[_Row], title: str, path: Path) -> None:
    """Plot the efficiency against the number of GPUs, as PNG.

    Args:
        rows: as `planned` or `measured` returns them.
        title: title of the plot.
        path: file to write.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # takes a second, and most plans draw nothing

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for scaling, style in (("strong", "--"), ("weak", "-")):
        chosen = [row for row in rows if row["scaling"] == scaling]
        gpus = [row["gpus"] for row in chosen]
        for stage in _RATES:
            values = [row[f"{stage}_efficiency"] for row in chosen]
            axes.plot(gpus, values, style, marker="o", label=f"{stage}, {scaling}")
    # Numbers of GPUs double from point to point.
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.1)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("rate per GPU over the first")
    axes.set_title(title, fontsize=10)
    axes.legend()
    make_folder(path.parent)
    with writing(path):
        figure.savefig(path, dpi=110)
