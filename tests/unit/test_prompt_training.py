"""The loop that trains a prompt: gradients that are not finite are passed over, and counted."""

from pathlib import Path

import pytest
import torch

from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.schema import RunConfig, Transfer
from post_dist.errors import InputError
from post_dist.runtime.distributed import World
from post_dist.runtime.metric_log import read_metric_log
from post_dist.runtime.schedule import Schedule
from post_dist.runtime.trackers import open_public_metrics
from post_dist.stages.prompt_training import PromptRun, train_prompts


def run_of(folder: Path, steps: int) -> PromptRun:
    prompt = torch.ones(2, 3)
    section = Transfer(steps=steps, batch_size=1, learning_rate=0.1)
    optimizer = torch.optim.SGD([prompt], lr=section.learning_rate)
    config = RunConfig(name="a")
    return PromptRun(
        [prompt],
        optimizer,
        section,
        RunFolder(folder, "transfer", config),
        open_metrics=open_public_metrics,
        show_loss=True,
    )


def train(folders: list[Path], bad_steps: list[set[int]], steps: int = 12) -> list[torch.Tensor]:
    runs = [run_of(folder, steps) for folder in folders]
    world = World(0, 1, 0, "none", torch.device("cpu"))

    def losses_at(step: int) -> list[torch.Tensor]:
        scales = [float("nan") if step in bad else 1.0 for bad in bad_steps]
        return [(run.parameters[0] * scale).sum() for run, scale in zip(runs, scales, strict=True)]

    first = {run.take_up("auto", world) for run in runs}
    train_prompts(runs, losses_at, first.pop(), world)
    return [run.parameters[0].detach() for run in runs]


def test_a_step_that_is_not_finite_moves_nothing(tmp_path: Path) -> None:
    clean, spoiled = train([tmp_path / "clean", tmp_path / "spoiled"], [set(), {3, 4, 9}])
    assert spoiled.isfinite().all()
    section = Transfer()
    schedule = Schedule(section.schedule, section.warmup_share, steps=12)
    missed = sum(0.1 * schedule.factor(step) for step in (3, 4, 9))
    torch.testing.assert_close(spoiled, clean + missed)
    skipped = [
        [
            line["step"]
            for line in read_metric_log(tmp_path / name / "metrics.jsonl")
            if line["skipped"]
        ]
        for name in ("clean", "spoiled")
    ]
    assert skipped == [[], [3, 4, 9]]


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match="5 steps in a row had gradients that are not finite, up to step 6 of spoiled",
    ):
        train([tmp_path / "clean", tmp_path / "spoiled"], [set(), {2, 3, 4, 5, 6}])
