"""A finished run with every part that a report page can show, without a model."""

import json
from pathlib import Path
from typing import Any

from post_dist.artifacts.manifest import write_artifact
from post_dist.config.yaml_files import write_yaml

HOSTILE = "<script>alert(1)</script> | `a` \x1b[31m[bold]\n# b"


def table_row(name: str, accuracy: float, epsilon: float | None = None) -> dict[str, Any]:
    """A row of a task with classes."""
    return {
        "name": name,
        "accuracy_micro": accuracy,
        "interval_95": [accuracy - 0.03, accuracy + 0.03],
        "accuracy_macro": accuracy - 0.01,
        "auc": 0.9,
        "n": 835,
        "epsilon": epsilon,
    }


def write_table(runs: Path, *rows: dict[str, Any], task: str = "toy", **parents: str) -> Path:
    """Write a finished evaluation, and return its folder."""
    evaluation = runs / "evaluate-0"
    table = {"task": task, "split": "test", "test_readings": 2, "rows": list(rows)}
    write_artifact(
        evaluation / "artifact",
        "evaluation",
        lambda folder: (folder / "table.json").write_text(json.dumps(table)),
        parents={name.replace("_", " "): digest for name, digest in parents.items()},
        config={},
    )
    return evaluation


def write_part(
    runs: Path, name: str, kind: Any, files: dict[str, Any], parents: Any = None, **config: Any
) -> str:
    """Write the artifact of a stage, and return its digest.

    Args:
        runs: the run folder.
        name: name of the stage's folder.
        kind: kind of the artifact.
        files: JSON of each file.
        parents: digests of what it was made from.
        **config: its settings.
    """

    def fill(folder: Path) -> None:
        for file, value in files.items():
            (folder / file).write_text(json.dumps(value))

    artifact = runs / name / "artifact"
    return write_artifact(artifact, kind, fill, parents=parents or {}, config=config).digest


def write_metrics(folder: Path, **first: float) -> None:
    """Write a metrics file of 400 steps whose values fall."""
    lines = []
    for step in range(400):
        values = {metric: value / (1 + step / 40) for metric, value in first.items()}
        lines.append(json.dumps({"seconds": step * 0.5, "step": step, **values}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def write_full_run(runs: Path, *, task: str = "toy") -> Path:
    """Write a run with three stages, two epsilons, losses and settings; return its evaluation."""
    adapter = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 10, "token_dim": 4096}
    claim = {"private": True, "epsilon": 1.0, "delta": 1e-5, "unit": "one example"}
    prompt = {"adapter_config.json": adapter, "privacy.json": claim}
    student = write_part(
        runs, "distill-1", "student", {"config.json": {}}, layers=[0, 1], num_teacher_layers=4,
        distill={"steps": 400},
    )  # fmt: skip
    public = write_part(runs, "warm_start-1", "public prompt", {}, warm_start={"steps": 9})
    tuned = write_part(
        runs, "tune-1", "soft prompt", prompt, {"public prompt": public},
        tune={"num_virtual_tokens": 10, "steps": 100, "init_text": HOSTILE},
    )  # fmt: skip
    transferred = write_part(
        runs, "transfer-1", "soft prompt", prompt, {"source prompt": tuned},
        transfer={"objective": "proxy", "steps": 400},
    )  # fmt: skip
    write_metrics(runs / "distill-1", ce=20.0, lm=25.0, cos=0.7)
    write_metrics(runs / "transfer-1", loss=0.3)
    rows = [
        table_row("zero-shot", 0.75),
        table_row("student + prompt", 0.81, 1.0),
        table_row("transferred", 0.84, 1.0),
        table_row("student + prompt, epsilon 8", 0.83, 8.0),
        table_row("transferred, epsilon 8", 0.86, 8.0),
    ]
    lineage = {"student": student, "student + prompt": tuned, "transferred": transferred}
    evaluation = write_table(runs, *rows, task=task, **lineage)
    settings = {"private_task": {"labels": {"0": ["bad"], "1": ["good"]}}}
    (evaluation / "resolved.yaml").write_text(write_yaml(settings))
    return evaluation
