"""Tuning that ends with one class for all texts says so, on texts that the student writes."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from objectives import TASK

from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.prompt import PromptContents
from post_dist.data.task_reader import TaskReader
from post_dist.models.generation import sampled_texts
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.models.tuning_task import TuningTask
from post_dist.runtime.distributed import World
from post_dist.stages.tune.effect import report_one_class

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, "none", CPU)


@pytest.fixture
def task(tmp_path: Path) -> TuningTask:
    """A model whose answers depend on the text, behind a random prompt."""
    tiny.write_model(tmp_path / "model", "llama")
    tiny.speak_up(tmp_path / "model")
    model = load_whole(tmp_path / "model", "fp32", CPU)
    tokenizer = load_tokenizer(tmp_path / "model")
    reader = TaskReader(TASK, tokenizer, masked=False, vocabulary=model.vocabulary_size)
    prompt_nd = 0.5 * torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    return TuningTask(model, reader, [], torch.zeros(0), prompt_nd)


def biased(task: TuningTask, biases: tuple[float, ...]) -> PromptContents:
    """The task's own prompt with biases."""
    return PromptContents(task.start_nd, replace(task.reader.task, class_biases=biases), None)


def of_tuning(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What was logged, without the progress."""
    return [record for record in caplog.records if record.getMessage().startswith("tune:")]


def test_one_class_for_all_texts_is_warned_of(
    task: TuningTask, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        report_one_class(task, biased(task, (0.0, 100.0)), ALONE)
    told, warning = of_tuning(caplog)
    assert told.getMessage().startswith("tune: most frequent class: 100% of 64 texts")
    assert warning.levelname == "WARNING"
    assert "100% of 64 texts that the model wrote get the class 'good'" in warning.getMessage()


@pytest.mark.parametrize(
    ("is_head", "privacy", "remedies"),
    [
        (False, None, "more examples or tune.adapter: head"),
        (False, {"epsilon": 1.0}, "more examples or a larger epsilon or tune.adapter: head"),
        (True, {"epsilon": 1.0}, "more examples or a larger epsilon"),
    ],
)
def test_what_is_advised_fits_what_was_tuned(
    task: TuningTask,
    is_head: bool,
    privacy: dict | None,
    remedies: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tuned = replace(biased(task, (0.0, 100.0)), privacy=privacy)
    if is_head:
        head = LinearHead.untrained(torch.randn(9, 32), 2)
        task = replace(task, adapter=head)
        tuned = replace(tuned, adapter=head)
    with caplog.at_level(logging.WARNING):
        report_one_class(task, tuned, ALONE)
    (warning,) = of_tuning(caplog)
    assert warning.getMessage().endswith(f"depend on the text; try {remedies}")


def test_answers_that_depend_on_the_text_are_not_warned_of(
    task: TuningTask, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        report_one_class(task, biased(task, ()), ALONE)
    (told,) = of_tuning(caplog)
    assert told.levelname == "INFO"


def test_the_student_writes_the_same_texts_each_time_and_no_two_alike(task: TuningTask) -> None:
    before = torch.random.get_rng_state()
    one = sampled_texts(task.model, [5, 6], 8, 12)
    assert torch.equal(one, sampled_texts(task.model, [5, 6], 8, 12))
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's randomness is its own"
    assert one.shape == (8, 12)
    assert len({tuple(row) for row in one.tolist()}) == 8


def test_a_model_whose_logits_are_not_finite_still_writes(task: TuningTask) -> None:
    with torch.no_grad():
        task.model.model.get_output_embeddings().weight[0] = torch.inf
    assert sampled_texts(task.model, [5], 4, 6).shape == (4, 6)
