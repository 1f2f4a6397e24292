"""A plan on a terminal."""

from typing import Any

from rich.table import Table

from post_dist.planning.scaling import lines


def plan_table(plan: dict[str, Any]) -> Table:
    """The stages beside each other."""
    stages = plan["stages"]
    shown = Table(
        title=f"{plan['gpus']} x {plan['gpu']}, {plan['precision']}: a model, not a measurement"
    )
    shown.add_column("", no_wrap=True)
    for stage in stages:
        shown.add_column(stage["stage"], justify="right", no_wrap=True)
    for name, value in _plan_rows(stages).items():
        shown.add_row(name, *value)
    return shown


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """What the table rests on, what follows from it, and what cannot work."""
    told = [
        f"in all: {plan['hours']:.2f} hours, {plan['gpu_hours']:.1f} GPU-hours, without {', '.join(plan['not_counted'])}",
        "rests on: "
        + ", ".join(
            f"{name.replace('_', ' ')} {value:.6g}" for name, value in plan["assumptions"].items()
        ),
        "distill as a long run: "
        + ", ".join(
            f"{name.replace('_', ' ')} {value:.4g}" for name, value in plan["long_run"].items()
        ),
        *lines(plan.get("sweep", [])),
        *(f"CONFLICT {conflict}" for conflict in plan["conflicts"]),
    ]
    if "nearest_that_fits" in plan:
        changes = plan["nearest_that_fits"]
        told.append(
            "nothing near fits"
            if changes is None
            else "fits with " + ", ".join(f"{name} {value}" for name, value in changes.items())
        )
    return told


def _plan_rows(stages: list[dict[str, Any]]) -> dict[str, list[str]]:
    def values(place: Any) -> list[str]:
        return [
            ""
            if (found := place(stage)) is None
            else f"{found:.4g}"
            if isinstance(found, float)
            else str(found)
            for stage in stages
        ]

    memory = dict.fromkeys(part for stage in stages for part in stage["memory_gib"])
    rows = {
        f"{part.replace('_', ' ')}, GiB": values(
            lambda stage, part=part: stage["memory_gib"].get(part)
        )
        for part in memory
    }
    rows["in all on the fullest GPU, GiB"] = values(lambda stage: stage["memory_total_gib"])
    rows["in a node's own memory, GiB"] = values(lambda stage: stage["node_memory_gib"])
    rows["shard group"] = values(lambda stage: stage.get("shard_group", {}).get("size"))
    rows["advised"] = values(lambda stage: stage.get("shard_group", {}).get("advised"))
    rows["teraflop a GPU and step"] = values(
        lambda stage: sum(stage["flops_per_gpu"].values()) / 1e12
    )
    for kind in ("gather", "fetch", "reduce"):
        rows[f"GiB a GPU takes in to {kind}"] = values(
            lambda stage, kind=kind: stage.get("received_gib_per_gpu", {}).get(kind)
        )
    parts = dict.fromkeys(part for stage in stages for part in stage.get("seconds", {}))
    rows |= {
        f"{part}, s": values(lambda stage, part=part: stage.get("seconds", {}).get(part))
        for part in parts
    }
    rows["step, s"] = values(lambda stage: stage["step_seconds"])
    rows["of the peak"] = values(lambda stage: stage.get("model_flops_utilisation"))
    for count in ("prompts", "prompts_at_once", "trials_of_each"):
        rows[count.replace("_", " ")] = values(lambda stage, count=count: stage.get(count))
    rows["steps"] = values(lambda stage: stage["steps"])
    rows["hours"] = values(lambda stage: stage["hours"])
    rows["GPU-hours"] = values(lambda stage: stage["gpu_hours"])
    rows["a checkpoint, GiB"] = values(lambda stage: stage.get("checkpoint_gib"))
    rows["kept of the teacher, GiB"] = values(lambda stage: stage.get("teacher_signals_gib"))
    rows["save every, s"] = values(lambda stage: stage.get("checkpoint_interval_seconds"))
    rows["epsilon"] = [
        ", ".join(f"{epsilon:.2f}" for epsilon in stage.get("epsilon", [])) for stage in stages
    ]
    return {name: row for name, row in rows.items() if any(row)}
