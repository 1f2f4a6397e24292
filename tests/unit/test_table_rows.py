"""Rows of the comparison table: what each needs, and what it computes."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from post_dist.artifacts.task import PromptTask
from post_dist.config.schema import Evaluate, RunConfig, Transfer
from post_dist.config.sources import Task as PrivateTask
from post_dist.data.tasks import Examples
from post_dist.files import digest_of
from post_dist.models import sharded
from post_dist.runtime.distributed import World
from post_dist.stages.evaluate import cached_answers, rows
from post_dist.stages.evaluate.cached_answers import (
    CachedAnswers,
    EvaluatedModel,
    EvaluationSplit,
    ModelFolders,
    load_answers,
)
from post_dist.stages.evaluate.rows import (
    PromptVariant,
    Row,
    RowInputs,
    TableEntry,
    table_entries,
    target_prompts,
)

SOURCE = Path("source")
BASELINES = ("published transfer", "full prompt tuning")


TASK = PromptTask("{text}", (("bad",), ("good",)), 48, False, "")


@dataclass(frozen=True)
class Prompt:
    """Stands in for a soft prompt: its answers are `value` for every class."""

    value: float
    epsilon: float | None = None
    task: PromptTask = TASK
    adapter: object = None


@dataclass(frozen=True)
class Answers:
    """Stands in for the cached answers of a model with two classes and three examples."""

    plain: float
    accepts_source: bool = True
    generates: bool = False

    def answers(self, prompt: Prompt | None, label: str) -> torch.Tensor:
        value = self.plain if prompt is None else self.plain + prompt.value
        return torch.full((3, 2), value)

    def accepts(self, prompt: Prompt) -> bool:
        return self.accepts_source


def inputs(
    *,
    label: str = "",
    target: Answers | None = Answers(10.0),
    student: Answers = Answers(1.0),
    source: Prompt = Prompt(0.5, 4.0),
    transfer: Transfer | None = None,
    private_text_scores: torch.Tensor | None = None,
) -> RowInputs:
    config = RunConfig(
        name="a", transfer=transfer or Transfer(), evaluate=Evaluate(baselines=BASELINES)
    )
    on_target = {
        "published transfer": Prompt(0.1, 4.0),
        "transferred": Prompt(0.2, 4.0),
        "full prompt tuning": Prompt(0.3, 4.0),
    }
    if target is None:
        on_target = {}
    baselines = {"majority class": torch.full((1, 2), 0.7)}
    return RowInputs(
        config, label, student, target, source, on_target, baselines, private_text_scores
    )


def values(entries: list[TableEntry]) -> dict[str, float]:
    return {entry.name: round(float(entry.answers[0, 0]), 6) for entry in entries}


def test_all_rows_in_the_order_of_the_table() -> None:
    entries = table_entries(inputs(), first=True)
    assert values(entries) == {
        "zero-shot": 10.0,
        "majority class": 0.7,
        "student + prompt": 1.5,
        "direct transfer": 10.5,
        "published transfer": 10.1,
        "transferred": 10.2,
        "proxy-tuning": 10.5,
        "full prompt tuning": 10.3,
    }
    assert [entry.epsilon for entry in entries] == [None, None, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]


def test_a_classifier_of_words_stands_beside_each_private_prompt() -> None:
    scores_NC = torch.full((1, 2), 0.6)
    given = inputs(label=", epsilon 2", private_text_scores=scores_NC)
    first, *_ = table_entries(given, first=False)
    assert first.name == "DP logistic regression, epsilon 2"
    assert (first.answers, first.epsilon) == (scores_NC, 4.0)


def test_a_data_owner_gets_the_rows_of_the_student() -> None:
    entries = table_entries(inputs(target=None), first=True)
    assert values(entries) == {"student": 1.0, "majority class": 0.7, "student + prompt": 1.5}


def test_a_second_variant_repeats_no_row_without_a_prompt() -> None:
    entries = table_entries(inputs(label=", epsilon 2"), first=False)
    names = [entry.name for entry in entries]
    assert names[0] == "student + prompt, epsilon 2"
    assert all(name.endswith(", epsilon 2") for name in names)


def test_biases_are_added_and_shown_without_but_not_for_the_direct_transfer() -> None:
    biased = Prompt(0.5, None, replace(TASK, class_biases=(0.25, -0.25)))
    entries = table_entries(inputs(source=biased, label=", x"), first=False)
    found = values(entries)
    assert found["student + prompt, x"] == 1.75
    assert found["student + prompt, x, without biases"] == 1.5
    assert found["direct transfer, x"] == 10.75
    assert "direct transfer, x, without biases" not in found
    assert found["proxy-tuning, x"] == 10.75


def test_a_prompt_with_a_head_is_not_used_without_it() -> None:
    headed = Prompt(0.5, adapter=object())
    found = values(table_entries(inputs(source=headed), first=False))
    assert "student + prompt" in found
    assert "direct transfer" not in found


def test_an_ensemble_subtracts_nothing() -> None:
    ensemble = Transfer(objective="ensemble", scores="classes", proxy_lambda=2.0)
    found = values(table_entries(inputs(transfer=ensemble), first=True))
    assert "proxy-tuning" not in found
    assert found["ensemble"] == found["zero-shot"] + 2 * found["student + prompt"]


def test_rows_that_do_not_apply_are_left_out() -> None:
    generating = inputs(
        student=Answers(1.0, generates=True), target=Answers(10.0, accepts_source=False)
    )
    names = [entry.name for entry in table_entries(generating, first=True)]
    assert "proxy-tuning" not in names
    assert "direct transfer" not in names


def test_what_each_row_needs_trained() -> None:
    section = Transfer(objective="proxy", scores="classes", alpha=0.1, trained_share=1.0)
    config = RunConfig(name="a", transfer=section, evaluate=Evaluate(baselines=BASELINES))
    needed = target_prompts(PromptVariant("", config, SOURCE))
    assert {name: prompt.made_by for name, prompt in needed.items()} == {
        "published transfer": "transfer",
        "transferred": "transfer",
        "full prompt tuning": "tune",
    }
    published = needed["published transfer"].config.transfer
    assert (published.objective, published.scores) == ("published", "vocabulary")
    assert (published.temperature, published.trained_share) == (2.0, 0.0)
    assert published.alpha == 0.1
    assert needed["transferred"].config.transfer == section


def test_a_given_prompt_is_not_trained_and_baselines_must_be_asked_for() -> None:
    given = Path("given")
    needed = target_prompts(PromptVariant("", RunConfig(name="a"), SOURCE, given))
    assert {name: prompt.folder for name, prompt in needed.items()} == {"transferred": given}


def test_a_baseline_is_one_class_and_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    class FirstClass(Row):
        name = "first class"
        once = True

        def entries(self, inputs: RowInputs) -> list[TableEntry]:
            constant = torch.tensor([[1.0, 0.0]]).expand(3, -1)
            return [TableEntry(self.name, constant, inputs.student)]

    monkeypatch.setattr(rows, "ROWS", (*rows.ROWS, FirstClass()))
    entries = table_entries(inputs(), first=True)
    assert entries[-1].name == "first class"
    assert len(table_entries(inputs(), first=False)) == len(entries) - 3


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "older", "renamed", "reshaped", "pipe"])
def test_damaged_answers_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """Those of an older version, which have no digest, too."""
    answers = CachedAnswers.__new__(CachedAnswers)
    answers._key = {"model": "m"}
    answers._cache = tmp_path / "answers"
    answers._world = World(0, 1, 0, "none", torch.device("cpu"))
    computed = []

    def compute(prompt: None, label: str) -> torch.Tensor:
        computed.append(label)
        return torch.arange(6.0).reshape(3, 2)

    monkeypatch.setattr(answers, "_compute", compute)
    for _ in range(2):
        assert answers.answers(None, "zero-shot").equal(torch.arange(6.0).reshape(3, 2))
    assert len(computed) == 1
    (file,) = answers._cache.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "bit":
        content[-3] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "older":
        save_file({"answers": torch.zeros(3, 2)}, file)
    elif damage == "reshaped":
        file.write_bytes(bytes(content).replace(b"[3,2]", b"[2,3]"))
    elif damage == "renamed":
        file.write_bytes(bytes(content).replace(b'"answers"', b'"questio"'))
    else:
        file.unlink()
        os.mkfifo(file)
    for _ in range(2):
        assert answers.answers(None, "zero-shot").equal(torch.arange(6.0).reshape(3, 2))
    assert len(computed) == 2
    assert list(answers._cache.iterdir()) == [file]


@pytest.mark.parametrize(
    ("engine", "own"),
    [
        ({}, False),
        ({"zero_stage": 3, "offload": "cpu", "deepspeed": {}}, False),
        ({"quantized_gathers": True}, True),
        ({"deepspeed": {"zero_optimization": {"overlap_comm": True}}}, True),
    ],
)
def test_the_answers_of_another_engine_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: dict, own: bool
) -> None:
    kept: dict[str, str] = {}

    def keep(evaluated: EvaluatedModel, split: EvaluationSplit, *rest: object) -> None:
        kept[evaluated.folder.name] = split.digest

    monkeypatch.setattr(cached_answers, "CachedAnswers", keep)
    monkeypatch.setattr(cached_answers, "load_whole", lambda *given: None)
    monkeypatch.setattr(sharded, "load_sharded", lambda *given: None)
    config = RunConfig.model_validate({"name": "x", "engine": {"precision": "fp32"} | engine})
    task = PrivateTask(name="x", visibility="private", path="x.csv")
    split = EvaluationSplit(task, Examples([], [], [], []), "rows")
    load_answers(
        ModelFolders(Path("student"), Path("target")),
        {"student": "s", "teacher": "t"},
        split,
        config,
        tmp_path,
        World(0, 1, 0, "none", torch.device("cpu")),
    )
    # Without such settings, the keys are those of version 0.2.0.
    plain = digest_of({"examples": "rows", "precision": "fp32"})
    assert kept["student"] == plain, "the student is not sharded"
    assert (kept["target"] != plain) == own
