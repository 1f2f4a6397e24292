"""Training of prompts: steps with gradients that are not finite are skipped and counted."""

from pathlib import Path

import pytest
import torch
from operations import reads_of

from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.schema import RunConfig, Transfer
from post_dist.errors import InputError
from post_dist.runtime.distributed import World
from post_dist.runtime.metric_log import read_metric_log
from post_dist.runtime.schedule import Schedule
from post_dist.runtime.trackers import open_public_metrics
from post_dist.stages.prompt_training import (
    PromptRun,
    PromptTrainer,
    train_prompt,
    train_prompts,
)

ALONE = World(0, 1, 0, "none", torch.device("cpu"))
LEARNING_RATE = 0.1


def make_run(folder: Path, steps: int, *, show_loss: bool = True) -> PromptRun:
    """Make a run over a prompt of ones, with plain gradient descent."""
    prompt = torch.ones(2, 3)
    section = Transfer(steps=steps, batch_size=1, learning_rate=LEARNING_RATE)
    return PromptRun(
        parameters=[prompt],
        optimizer=torch.optim.SGD([prompt], lr=section.learning_rate),
        section=section,
        folder=RunFolder(folder, "transfer", RunConfig(name="a")),
        open_metrics=open_public_metrics,
        show_loss=show_loss,
    )


def train(
    folders: list[Path], bad_steps: list[set[int]], steps: int = 12
) -> tuple[list[torch.Tensor], list[InputError | None]]:
    """Train a prompt in each folder, with a loss of NaN at its bad steps."""
    runs = [make_run(folder, steps) for folder in folders]

    def losses_at(step: int) -> list[torch.Tensor]:
        losses = []
        for run, bad in zip(runs, bad_steps, strict=True):
            scale = float("nan") if step in bad else 1.0
            losses.append((run.parameters[0] * scale).sum())
        return losses

    first_steps = [run.restore_newest("auto", ALONE) for run in runs]
    failures = train_prompts(runs, losses_at, first_steps[0], ALONE)
    return [run.parameters[0].detach() for run in runs], failures


def skipped_steps(folder: Path) -> list[int]:
    lines = read_metric_log(folder / "metrics.jsonl")
    return [line["step"] for line in lines if line["skipped"]]


def test_a_step_of_several_prompts_reads_all_values_at_once(tmp_path: Path) -> None:
    """`tolist` of one tensor, which a CPU does not count as a read. A `bool` of a tensor counts."""
    runs = [make_run(tmp_path / name, 12) for name in ("one", "other")]
    for run in runs:
        run.restore_newest("auto", ALONE)
    trainer = PromptTrainer(runs, lambda step: [run.parameters[0].sum() for run in runs], ALONE)
    assert reads_of(lambda: trainer.take_step(1)) == 0


def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    prompts, failures = train([tmp_path / "clean", tmp_path / "spoiled"], [set(), {3, 4, 9}])
    clean, spoiled = prompts
    assert failures == [None, None]
    assert spoiled.isfinite().all()
    section = Transfer()
    schedule = Schedule(section.schedule, section.warmup_share, steps=12)
    missed = sum(LEARNING_RATE * schedule.factor(step) for step in (3, 4, 9))
    torch.testing.assert_close(spoiled, clean + missed)
    assert skipped_steps(tmp_path / "clean") == []
    assert skipped_steps(tmp_path / "spoiled") == [3, 4, 9]


def test_five_skipped_steps_in_a_row_end_the_prompt_and_not_the_others(tmp_path: Path) -> None:
    message = "spoiled: 5 steps in a row were not finite, up to step 6"
    ((alone,), _) = train([tmp_path / "alone"], [set()])
    ((clean, _), failures) = train(
        [tmp_path / "clean", tmp_path / "spoiled"], [set(), {2, 3, 4, 5, 6}]
    )
    assert torch.equal(clean, alone)
    assert failures[0] is None
    assert message in str(failures[1])


def test_the_last_prompt_that_diverges_ends_the_training(tmp_path: Path) -> None:
    _, failures = train([tmp_path / "one", tmp_path / "two"], [set(range(1, 12)), set(range(12))])
    assert None not in failures
    assert len(read_metric_log(tmp_path / "one" / "metrics.jsonl")) == 6
    run = make_run(tmp_path / "alone", 12)
    first_step = run.restore_newest("auto", ALONE)
    with pytest.raises(InputError, match="5 steps in a row were not finite"):
        train_prompt(run, lambda step: run.parameters[0].sum() * float("nan"), first_step, ALONE)


def test_a_loss_from_private_data_is_not_shown(tmp_path: Path) -> None:
    texts = []
    for show_loss in (True, False):
        run = make_run(tmp_path / f"{show_loss}", steps=1, show_loss=show_loss)
        run.restore_newest("auto", ALONE)
        trainer = PromptTrainer([run], lambda step, run=run: [run.parameters[0].sum()], ALONE)
        texts.append(trainer.take_step(0))
    assert texts == ["loss 6.0000", ""]
