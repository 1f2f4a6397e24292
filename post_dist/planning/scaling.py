"""How a step scales with the number of GPUs, planned or measured. Strong scaling keeps the batch, weak scaling each GPU's part of it.

A row has `scaling`, `gpus`, for distill and for transfer the seconds of a step and the efficiency (the rate per GPU over that on the
fewest), and `conflicts`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from post_dist.config.precision import Precision
from post_dist.config.schema import RunConfig
from post_dist.errors import InputError
from post_dist.files import writing
from post_dist.models.size import ModelSize
from post_dist.planning.hardware import Machine
from post_dist.planning.plan import plan_run

_RATES = {"distill": "tokens_per_second", "transfer": "samples_per_second"}
_Stages = dict[str, dict[str, Any]]
"""By name, what is planned or measured of a step."""


def planned(
    config: RunConfig,
    teacher: ModelSize,
    machine: Machine,
    precision: Precision,
    gpus: Sequence[int],
) -> list[dict[str, Any]]:
    """The rows of a plan, on each number of GPUs.

    Raises:
        InputError: a number is more than a node, and no whole nodes.
    """
    in_node = machine.gpus_per_node
    uneven = [count for count in gpus if count > in_node and count % in_node]
    if uneven:
        raise InputError(
            f"--sweep: {uneven[0]} GPUs are not whole nodes of {in_node}",
            "take multiples of them, or less than one",
        )
    rows: list[dict[str, Any]] = []
    for kind in ("strong", "weak"):
        points: list[tuple[int, _Stages]] = []
        for count in sorted(gpus):
            place = replace(machine, nodes=-(-count // in_node), gpus_per_node=min(count, in_node))
            changed = config if kind == "strong" else grown(config, place.ranks / min(gpus))
            stages = plan_run(changed, teacher, place, precision)["stages"]
            points.append((place.ranks, {stage["stage"]: stage for stage in stages}))
        rows += _rows(kind, points, lambda stage, found: found["conflicts"])
    return rows


def measured(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of measurements that `bench scale --write` has kept, of one run file on several numbers of GPUs.

    Raises:
        InputError: a file is not one of these.
    """

    def stragglers(stage: str, found: dict[str, Any]) -> list[str]:
        return [f"{stage}: straggler {found['straggler']}"] if found["straggler"] else []

    try:
        files_found = sorted(
            (json.loads(file.read_text()) for file in files), key=lambda each: int(each["ranks"])
        )
        rows: list[dict[str, Any]] = []
        for kind in ("strong", "weak"):
            # On one rank, the two are the same and measured once.
            points: list[tuple[int, _Stages]] = [
                (
                    each["ranks"],
                    {
                        row["stage"]: row
                        for row in each["rows"]
                        if row["scaling"] == kind or each["ranks"] == 1
                    },
                )
                for each in files_found
            ]
            rows += _rows(kind, points, stragglers)
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError):
        raise InputError(
            "not all of these files are measurements",
            "`post-dist bench scale RUN.yaml --write FILE` makes them",
        ) from None
    return rows


def _rows(
    kind: str,
    points: Sequence[tuple[int, _Stages]],
    conflicts: Callable[[str, dict[str, Any]], list[str]],
) -> Iterator[dict[str, Any]]:
    """A row for each number of GPUs; the efficiency is over the first."""
    fewest, first = points[0]
    for gpus, stages in points:
        row: dict[str, Any] = {"scaling": kind, "gpus": gpus}
        for stage, rate in _RATES.items():
            efficiency = stages[stage][rate] / first[stage][rate] * fewest / gpus
            row |= {
                f"{stage}_step_seconds": stages[stage]["step_seconds"],
                f"{stage}_efficiency": efficiency,
            }
        yield row | {
            "conflicts": [
                problem for stage in _RATES for problem in conflicts(stage, stages[stage])
            ]
        }


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as text."""
    told = []
    for row in rows:
        steps = (
            (stage, row[f"{stage}_step_seconds"], row[f"{stage}_efficiency"]) for stage in _RATES
        )
        rates = ", ".join(
            f"{stage} {seconds:.4g} s a step ({efficiency:.0%})"
            for stage, seconds, efficiency in steps
        )
        told.append(
            "; ".join([f"{row['scaling']} scaling, {row['gpus']} GPUs: {rates}", *row["conflicts"]])
        )
    return told


def grown(config: RunConfig, times: float) -> RunConfig:
    """The run with so many times the rows in each step of distill and of transfer."""
    sections = {
        name: getattr(config, name).model_copy(
            update={"batch_size": round(getattr(config, name).batch_size * times)}
        )
        for name in _RATES
    }
    return config.model_copy(update=sections)


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Efficiency against the number of GPUs, as PNG.

    Raises:
        InputError: it cannot be written there.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for kind, style in (("strong", "--"), ("weak", "-")):
        chosen = [row for row in rows if row["scaling"] == kind]
        for stage in _RATES:
            values = [row[f"{stage}_efficiency"] for row in chosen]
            axes.plot(
                [row["gpus"] for row in chosen], values, style, marker="o", label=f"{stage}, {kind}"
            )
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.1)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("rate per GPU over the first")
    axes.set_title(title, fontsize=10)
    axes.legend()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
