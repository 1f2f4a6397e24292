"""What a student gives away of its teacher, counted, and compared with its weights by `verify`."""

import math
from pathlib import Path

import pytest
import tiny
import torch

from post_dist.config.schema import Distill
from post_dist.models.load import load_whole
from post_dist.stages.distill.given_away import given_away, perplexities
from post_dist.stages.distill.held_out import _loss_of_teacher
from post_dist.stages.distill.model import DistillationModel
from post_dist.verify import verify

CPU = torch.device("cpu")


def test_changed_parameters_are_counted_and_frozen_ones_are_unchanged(tmp_path: Path) -> None:
    model = load_whole(tiny.write_model(tmp_path / "m", "llama", layers=2), "fp32", CPU).model
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    state = model.state_dict()
    trained = {name: state[name].clone() for name in state if "layers.1" in name}
    moved = [name for name in trained if "mlp" in name]
    for name in moved:
        trained[name][0, 0] += 1
    assert given_away(model, trained, 10**6) == {
        "student_parameters": sum(sizes.values()),
        "unchanged_parameters": sum(sizes.values()) - sum(sizes[name] for name in moved),
        "teacher_parameters": 10**6,
    }


def test_the_teachers_loss_is_that_of_transformers(tmp_path: Path) -> None:
    model = load_whole(tiny.write_model(tmp_path / "m", "llama"), "fp32", CPU)
    tokens = torch.randint(4, 500, (3, 12))
    labels = torch.full_like(tokens, -100)
    labels[:, :-1] = tokens[:, 1:]
    student = DistillationModel(model, Distill(), head_is_frozen=True)
    with torch.no_grad():
        hidden = model(tokens)
        wanted = model.model(input_ids=tokens, labels=tokens).loss
        found = _loss_of_teacher(student, hidden, labels)
    torch.testing.assert_close(found, wanted)


def test_the_perplexity_of_a_broken_student_is_a_number() -> None:
    found = perplexities({"teacher_lm": 2.0, "lm": 1e5}, {4096: math.inf, 8192: math.nan})
    assert found["teacher"] == pytest.approx(7.389, abs=1e-3)
    assert math.isfinite(found["student"])
    assert math.isfinite(found["student after 4096 more tokens"])
    assert math.isfinite(found["student after 8192 more tokens"])


@pytest.mark.parametrize(
    ("changes", "ok"),
    [
        ({}, True),
        ({"student_parameters": 1, "unchanged_parameters": 1}, False),
        ({"unchanged_parameters": -1}, False),
        ({"unchanged_parameters": 10**9}, False),
        ({"teacher_parameters": 7}, False),
        ({"teacher_parameters": 1e9}, False),
        ({"teacher_parameters": "many"}, False),
        ({"teacher_parameters": True}, False),
        ({"more": 1}, False),
    ],
    ids=str,
)
def test_a_statement_that_the_weights_contradict_is_refused(
    tmp_path: Path, changes: dict, ok: bool
) -> None:
    model = load_whole(tiny.write_model(tmp_path / "m", "llama", layers=2), "fp32", CPU).model
    statement = given_away(model, {}, 10**6) | changes

    found = verify(tiny.write_student(tmp_path / "student", given_away=statement))
    assert found["ok"] is ok
    if ok:
        assert found["given_away"] == statement
    else:
        assert "its manifest says otherwise" in found["problems"][0]
