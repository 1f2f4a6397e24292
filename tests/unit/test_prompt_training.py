"""The loop that trains a prompt: gradients that are not finite are passed over, and counted."""

from pathlib import Path

import pytest
import torch

from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.schema import RunConfig, Transfer
from post_dist.errors import InputError
from post_dist.runtime.distributed import World
from post_dist.runtime.metrics import read_metrics
from post_dist.stages.prompt_training import schedule_at, train_prompt


def train(folder: Path, bad_steps: set[int], steps: int = 12) -> torch.Tensor:
    prompt = torch.ones(2, 3)
    section = Transfer(steps=steps, batch_size=1, learning_rate=0.1)

    def loss_at(step: int) -> torch.Tensor:
        return (prompt * (float("nan") if step in bad_steps else 1.0)).sum()

    run = RunFolder(folder, "transfer", RunConfig(name="a"))
    world = World(0, 1, 0, "none", torch.device("cpu"))
    optimizer = torch.optim.SGD([prompt], lr=section.learning_rate)
    train_prompt([prompt], loss_at, optimizer, section, run, world, "auto", metrics_name="metrics.jsonl", show_loss=True)
    return prompt.detach()


def test_a_step_that_is_not_finite_moves_nothing(tmp_path: Path) -> None:
    clean, spoiled = train(tmp_path / "clean", set()), train(tmp_path / "spoiled", {3, 4, 9})
    assert spoiled.isfinite().all()
    missed = sum(0.1 * schedule_at(Transfer(), step, 12) for step in (3, 4, 9))
    torch.testing.assert_close(spoiled, clean + missed)
    lines = read_metrics(tmp_path / "spoiled/metrics.jsonl")
    assert [line["step"] for line in lines if line["skipped"]] == [3, 4, 9]


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="5 steps in a row had gradients that are not finite, up to step 6"):
        train(tmp_path, {2, 3, 4, 5, 6})
