"""A plan over numbers of GPUs: strong scaling keeps the batch, weak scaling keeps each GPU's part of it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from post_dist.config.deepspeed import Precision
from post_dist.config.schema import RunConfig
from post_dist.planning.plan import Machine, plan
from post_dist.planning.sizes import ModelSize


def sweep(config: RunConfig, teacher: ModelSize, machine: Machine, precision: Precision, gpus: Sequence[int]) -> list[dict[str, Any]]:
    """For each number of GPUs and each kind of scaling: the step of distill and of transfer, and its efficiency over the first number."""
    rows: list[dict[str, Any]] = []
    for kind in ("strong", "weak"):
        first: dict[str, Any] = {}
        for count in sorted(gpus):
            place = replace(machine, nodes=-(-count // machine.gpus_per_node), gpus_per_node=min(count, machine.gpus_per_node))
            changed = config if kind == "strong" else grown(config, place.ranks / min(gpus))
            stages = {stage["stage"]: stage for stage in plan(changed, teacher, place, precision)["stages"]}
            rate = {"distill": stages["distill"]["tokens_per_second"], "transfer": stages["transfer"]["samples_per_second"]}
            first = first or {"gpus": place.ranks, **rate}
            row: dict[str, Any] = {"scaling": kind, "gpus": place.ranks}
            for stage, value in rate.items():
                row[f"{stage}_step_seconds"] = stages[stage]["step_seconds"]
                row[f"{stage}_efficiency"] = value / first[stage] * first["gpus"] / place.ranks
            rows.append(row | {"conflicts": [problem for stage in rate for problem in stages[stage]["conflicts"]]})
    return rows


def grown(config: RunConfig, times: float) -> RunConfig:
    """The run with so many times the rows in each step of distill and of transfer."""
    sections = {
        name: getattr(config, name).model_copy(update={"batch_size": round(getattr(config, name).batch_size * times)})
        for name in ("distill", "transfer")
    }
    return config.model_copy(update=sections)


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Efficiency against the number of GPUs, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for kind, style in (("strong", "--"), ("weak", "-")):
        chosen = [row for row in rows if row["scaling"] == kind]
        for stage in ("distill", "transfer"):
            values = [row[f"{stage}_efficiency"] for row in chosen]
            axes.plot([row["gpus"] for row in chosen], values, style, marker="o", label=f"{stage}, {kind}")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.1)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("rate per GPU over the first")
    axes.set_title(f"{title} (a model, not a measurement)", fontsize=10)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
