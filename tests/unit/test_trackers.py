"""Metrics: public ones go to every tracker, private ones to one file and nowhere else."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.schema import RunConfig
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


@pytest.mark.parametrize("open_metrics", [open_public_metrics, open_private_metrics])
def test_other_ranks_keep_nothing(folder: RunFolder, open_metrics) -> None:
    open_metrics(folder, SECOND).write(step=0, loss=1.0)
    assert not folder.path.exists()
