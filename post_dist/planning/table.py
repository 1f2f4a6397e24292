"""Print a plan on a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from post_dist.planning.scaling import scaling_lines
from post_dist.runtime.terminal import bar, duration

_Stage = dict[str, Any]

_LAYOUT = {
    "total on the fullest GPU, GiB": "memory_total_gib",
    "memory of a node, GiB": "node_memory_gib",
    "shard group": "shard_group.size",
    "advised": "shard_group.advised",
}
_TRAFFIC = {
    "GiB that a GPU receives to gather": "received_gib_per_gpu.gather",
    "GiB that a GPU receives to fetch": "received_gib_per_gpu.fetch",
    "GiB that a GPU receives to reduce": "received_gib_per_gpu.reduce",
}
_TOTALS = {
    "reading the examples, s": "reading_seconds",
    "counting right validation examples, s": "counting_seconds",
    "step, s": "step_seconds",
    # Programs read this field of `plan --json`, so it keeps its British spelling.
    "share of the peak": "model_flops_utilisation",
    "prompts": "prompts",
    "prompts at once": "prompts_at_once",
    "trials of each": "trials_of_each",
    "steps": "steps",
    "attacks on the student, hours": "attack_hours",
    "hours": "hours",
    "GPU-hours": "gpu_hours",
    "a checkpoint, GiB": "checkpoint_gib",
    "cached teacher signals, GiB": "teacher_signals_gib",
    "save every, s": "checkpoint_interval_seconds",
}
"""Titles of table rows, each with the place of its number in a stage's plan."""


def plan_table(plan: dict[str, Any]) -> Table:
    """Lay out the stages of a plan side by side."""
    stages = plan["stages"]
    table = Table(
        title=f"{plan['gpus']} x {plan['gpu']}, {plan['precision']}: a model, not a measurement"
    )
    table.add_column("", no_wrap=True)
    # One column for each stage, so that the rows compare the stages.
    for stage in stages:
        table.add_column(stage["stage"], justify="right", no_wrap=True)
    for title, cells in _plan_rows(stages).items():
        table.add_row(title, *cells)
    return table


def plan_verdict(plan: dict[str, Any]) -> list[str]:
    """Write whether the run works as planned, and a bar for the memory and time of each stage."""
    lines = [_verdict(plan), ""]
    widest = max(len(stage["stage"]) for stage in plan["stages"])
    limit = plan["gpu_memory_gib"]
    for stage in plan["stages"]:
        memory = stage["memory_total_gib"]
        share = stage["hours"] / plan["hours"] if plan["hours"] else 0.0
        lines.append(
            f"{stage['stage']:<{widest}}  memory {bar(memory / limit)} {memory:6.1f} of {limit:g} "
            f"GiB   time {bar(share)} {duration(3600 * stage['hours'])}"
        )
    return [*lines, ""]


def _verdict(plan: dict[str, Any]) -> str:
    where = f"{plan['gpus']} x {plan['gpu']}"
    fullest = max(plan["stages"], key=lambda stage: stage["memory_total_gib"])
    needed = f"{fullest['memory_total_gib']:.1f} of {plan['gpu_memory_gib']:g} GiB"
    if not all(stage["fits"] for stage in plan["stages"]):
        verdict = (
            f"It does not fit on {where}: {fullest['stage']} needs {needed} of a GPU's memory."
        )
        changes = plan.get("nearest_that_fits")
        return f"{verdict} It {_fits_with(changes)}." if changes else verdict
    verdict = f"It fits on {where} and takes {duration(3600 * plan['hours'])}. "
    verdict += f"The fullest GPU holds {needed}, in {fullest['stage']}."
    if plan["conflicts"]:
        count = len(plan["conflicts"])
        reasons = "the reason" if count == 1 else f"{count} reasons"
        return f"It cannot run as planned, for {reasons} below. {verdict}"
    return verdict


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """Write the totals, assumptions and conflicts of a plan as lines below its table."""
    without = ", ".join(plan["not_counted"])
    lines = [
        f"total: {duration(3600 * plan['hours'])}, {plan['gpu_hours']:.3g} GPU-hours, "
        f"without {without}",
        f"assumptions: {_listed(plan['assumptions'], digits=6)}",
        f"distill as a long run: {_listed(plan['long_run'], digits=4)}",
        *scaling_lines(plan.get("sweep", [])),
    ]
    if plan["corpus"] is not None:
        lines.append(f"corpus on CPUs: {_listed(plan['corpus'], digits=4)}")
    lines += [f"CONFLICT {conflict}" for conflict in plan["conflicts"]]
    if "nearest_that_fits" in plan:
        lines.append(_fits_with(plan["nearest_that_fits"]))
    return lines


def _listed(numbers: Mapping[str, float], digits: int) -> str:
    """Write names and numbers in one line."""
    parts = []
    for name, value in numbers.items():
        parts.append(f"{name.replace('_', ' ')} {value:.{digits}g}")
    return ", ".join(parts)


def _fits_with(changes: Mapping[str, str] | None) -> str:
    if changes is None:
        return "none of the changes that plan tries fits"
    return "fits with " + ", ".join(f"{name} {value}" for name, value in changes.items())


def _plan_rows(stages: list[_Stage]) -> dict[str, list[str]]:
    """Return the table's rows by title: one cell for each stage, without rows that are empty."""
    rows: dict[str, list[str]] = {}

    def add(title: str, place: str) -> None:
        rows[title] = [_cell(_at(stage, place)) for stage in stages]

    # Memory comes first, then traffic, then time: a stage that does not fit need not be fast.
    for part in _parts(stages, "memory_gib"):
        add(f"{part.replace('_', ' ')}, GiB", f"memory_gib.{part}")
    for title, place in _LAYOUT.items():
        add(title, place)
    rows["teraflop of a GPU in a step"] = [_cell(_teraflop(stage)) for stage in stages]
    for title, place in _TRAFFIC.items():
        add(title, place)
    for part in _parts(stages, "seconds"):
        add(f"{part}, s", f"seconds.{part}")
    for title, place in _TOTALS.items():
        add(title, place)
    rows["epsilon"] = [_epsilons(stage) for stage in stages]
    # A row that no stage has, such as offload, is left out.
    return {title: cells for title, cells in rows.items() if any(cells)}


def _parts(stages: list[_Stage], name: str) -> list[str]:
    """List the keys of a mapping that stages have, each once, in their order."""
    found: dict[str, None] = {}
    for stage in stages:
        found |= dict.fromkeys(stage.get(name, {}))
    return list(found)


def _at(stage: _Stage, place: str) -> Any:
    """Return the number at `name` or at `mapping.name`, or None if the stage does not have it."""
    first, _, second = place.partition(".")
    value = stage.get(first)
    if not second:
        return value
    return (value or {}).get(second)


def _teraflop(stage: _Stage) -> float:
    return float(sum(stage["flops_per_gpu"].values()) / 1e12)


def _epsilons(stage: _Stage) -> str:
    return ", ".join(f"{epsilon:.2f}" for epsilon in stage.get("epsilon", []))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
