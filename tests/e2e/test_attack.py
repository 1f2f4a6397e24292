"""`distill.attack_tokens`: what an owner gains who distills the student further."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from started import run, run_ranks

from post_dist.artifacts.manifest import read_manifest
from post_dist.models.load import load_whole
from post_dist.verify import verify

STUDENT = ("--set=student.layers=[0,3]", "--set=student.frozen_lower_layers=1")
# 4 steps of 4 sequences of 32 tokens, and 20 steps.
ATTACKS = ("--set=distill.attack_tokens=[500, 2560]", "--set=distill.learning_rate=0.01")


def perplexities(output: Path) -> dict[str, float]:
    """Return the perplexities in the manifest of the one student in a folder."""
    (artifact,) = output.rglob("distill-*/artifact")
    return read_manifest(artifact, "student").config["perplexity"]


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file of a provider, whose student was attacked by one process in `runs`."""
    folder = tmp_path_factory.mktemp("attack")
    file = tiny.write_run(folder)
    done = run("distill", file, f"--output={folder / 'runs'}", *STUDENT, *ATTACKS)
    assert done.returncode == 0, done.stderr
    return file


def test_more_distillation_brings_the_student_nearer_to_its_teacher(provider: Path) -> None:
    found = perplexities(provider.parent / "runs")
    names = [
        "teacher",
        "student",
        "student after 500 more tokens",
        "student after 2560 more tokens",
    ]
    assert list(found) == names
    assert found[names[3]] < found[names[2]] < found[names[1]]

    (artifact,) = provider.parent.glob("runs/tiny/distill-*/artifact")
    held_out = read_manifest(artifact, "student").config["held_out"]
    assert found["teacher"] == math.exp(held_out["teacher_lm"])
    assert found["student"] == math.exp(held_out["lm"])
    # The owner's `verify` and the provider's card tell the same.
    assert verify(artifact)["perplexity"] == found
    card = (artifact / "README.md").read_text()
    assert f"| perplexity, {names[3]} | {found[names[3]]} |" in card
    assert not list(artifact.parent.glob("checkpoints")), "the attacks leave nothing behind"


def test_an_attack_leaves_the_student_as_it_was(provider: Path, tmp_path: Path) -> None:
    done = run("distill", provider, f"--output={tmp_path}", *STUDENT, ATTACKS[1])
    assert done.returncode == 0, done.stderr
    assert list(perplexities(tmp_path)) == ["teacher", "student"]
    (alone,) = tmp_path.rglob("distill-*/artifact")
    (attacked,) = provider.parent.glob("runs/tiny/distill-*/artifact")
    # An attack is a setting of its own, and not one of the student.
    assert alone.parent.name != attacked.parent.name
    weights = [
        load_whole(folder, "fp32", torch.device("cpu")).model.state_dict()
        for folder in (alone, attacked)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    lines = [
        [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
        for folder in (alone, attacked)
    ]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]


@pytest.mark.parametrize("stage", [2, 3])
def test_several_ranks_attack_as_one_does(provider: Path, tmp_path: Path, stage: int) -> None:
    sharded = f"--set=engine.zero_stage={stage}"
    command = ("distill", provider, f"--output={tmp_path}", sharded, *STUDENT, *ATTACKS)
    made = run_ranks(*command)
    assert [rank.returncode for rank in made] == [0, 0], made[0].stderr
    wanted = perplexities(provider.parent / "runs")
    assert perplexities(tmp_path) == pytest.approx(wanted, rel=1e-3)


def test_a_teacher_with_another_head_than_the_student_s_is_still_the_teacher(
    tmp_path: Path, main: Callable
) -> None:
    file = tiny.write_run(tmp_path)
    trained = ("--set=student.freeze_head=false", "--set=student.freeze_embeddings=false")
    code, _, err = main("distill", file, f"--output={tmp_path / 'out'}", *trained, *ATTACKS)
    assert code == 0, err
    found = perplexities(tmp_path / "out")
    assert found["student after 2560 more tokens"] < found["student"]


def test_a_killed_attack_goes_on_where_it_was(provider: Path, tmp_path: Path) -> None:
    command = ("distill", provider, f"--output={tmp_path}", *STUDENT, *ATTACKS)
    # The student has 6 steps and the first attack 4, so the second one dies in its seventh step.
    killed, other = run_ranks(*command, preparations=("killed in its 17th step", "nothing"))
    assert killed.returncode == -signal.SIGKILL
    assert other.returncode not in (0, None)
    (folder,) = tmp_path.rglob("distill-*/checkpoints")
    assert (folder / "attack-500.json").exists()
    assert (folder / "attack-2560" / "step-4").exists()

    made = run_ranks(*command)
    assert [rank.returncode for rank in made] == [0, 0], made[0].stderr
    assert "resuming from step 4" in made[0].stderr
    wanted = perplexities(provider.parent / "runs")
    assert perplexities(tmp_path) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("statement", "ok"),
    [
        ({"teacher": 12.5, "student": 20.0}, True),
        ({"student after 1000000 more tokens": 1.0}, True),
        ({"teacher": 0.5}, False),
        ({"teacher": "12"}, False),
        ({"teacher": True}, False),
        ({"\x1b[31mteacher": 12.5}, False),
        ({"student after  more tokens": 12.5}, False),
        ([12.5], False),
        (None, False),
    ],
    ids=str,
)
def test_perplexities_that_are_none_are_refused(
    tmp_path: Path, statement: object, ok: bool
) -> None:
    found = verify(tiny.write_student(tmp_path / "student", perplexity=statement))
    assert found["ok"] is ok
    assert ok or "no perplexities" in found["problems"][0]
