"""Metrics: public ones go to every tracker, private ones to one file and nowhere else."""

import dataclasses
import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
import torch

from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.schema import RunConfig
from post_dist.config.tracking import TrackerName
from post_dist.runtime import trackers
from post_dist.runtime.distributed import World
from post_dist.runtime.private_metrics import open_private_metrics
from post_dist.runtime.trackers import JsonLines, PublicMetrics, Tracker, open_public_metrics

FIRST = World(0, 2, 0, "none", torch.device("cpu"))
SECOND = World(1, 2, 1, "none", torch.device("cpu"))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", "distill", RunConfig(name="a"))


class Memory:
    """A tracker that a newcomer might add."""

    def __init__(self) -> None:
        self.seen: list[PublicMetrics] = []

    def log(self, metrics: PublicMetrics) -> None:
        self.seen.append(metrics)


def test_a_new_tracker_gets_what_the_file_gets(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory()
    both: list[Tracker] = [JsonLines(folder), memory]
    monkeypatch.setattr(trackers, "_trackers", lambda folder: both)
    record = open_public_metrics(folder, FIRST)
    record.write(step=3, loss=0.5, skipped=False)
    (line,) = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert list(json.loads(line)) == ["seconds", "step", "loss", "skipped"]
    (seen,) = memory.seen
    assert (seen.step, dict(seen.values)) == (3, {"loss": 0.5, "skipped": False})


def test_public_metrics_cannot_be_changed(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory()
    monkeypatch.setattr(trackers, "_trackers", lambda folder: [memory])
    open_public_metrics(folder, FIRST).write(step=0, loss=1.0)
    with pytest.raises(TypeError):
        memory.seen[0].values["loss"] = 2.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        memory.seen[0].step = 1


def test_private_metrics_reach_no_tracker(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory()
    monkeypatch.setattr(trackers, "_trackers", lambda folder: [memory])
    open_private_metrics(folder, FIRST).write(step=0, loss=1.0)
    assert memory.seen == []
    assert [path.name for path in folder.path.iterdir()] == ["private_metrics.jsonl"]


def test_a_stage_with_private_data_knows_no_tracker() -> None:
    config = RunConfig(name="a", tracking={"to": ("tensorboard",)})
    assert config.view("transfer").tracking.to == ("tensorboard",)
    for stage in ("tune", "evaluate"):
        assert config.view(stage).tracking.to == ()


@pytest.mark.parametrize("name", get_args(TrackerName))
def test_each_tracker_writes_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    for variable in ("TRACKIO_DIR", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.delenv(variable, raising=False)
    config = RunConfig(name="a", tracking={"to": (name,)})
    folder = RunFolder(tmp_path / "a/distill-1a2b3c4d", "distill", config)
    before = set(tmp_path.rglob("*"))
    record = open_public_metrics(folder, FIRST)
    for step in range(3):
        record.write(step=step, loss=0.5, skipped=False)
    # trackio writes in a thread.
    end = time.monotonic() + 20
    written = set()
    while len(written) < 2 and time.monotonic() < end:
        written = {path for path in set(tmp_path.rglob("*")) - before if path.is_file()}
        time.sleep(0.1)
    assert {path.name for path in written} > {"metrics.jsonl"}


@pytest.mark.parametrize("open_metrics", [open_public_metrics, open_private_metrics])
def test_other_ranks_keep_nothing(folder: RunFolder, open_metrics) -> None:
    open_metrics(folder, SECOND).write(step=0, loss=1.0)
    assert not folder.path.exists()
