"""`distill.attack_tokens`: what an owner gains who distills the student further."""

import json
import math
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from started import run, run_ranks

from post_dist.artifacts.manifest import read_manifest
from post_dist.models.load import load_whole
from post_dist.stages.distill import attack
from post_dist.verify import verify

STUDENT = ("--set=student.layers=[0,3]", "--set=student.frozen_lower_layers=1")
# 4 steps of 4 sequences of 32 tokens, and 20 steps.
ATTACKS = ("--set=distill.attack_tokens=[500, 2560]", "--set=distill.learning_rate=0.003")


def student(output: Path, *, attacked: bool) -> Path:
    """Return the folder of the one student in a folder, before its attacks or after them."""
    name = "distill-attack-????????" if attacked else "distill-????????"
    (artifact,) = output.rglob(f"{name}/artifact")
    return artifact


def perplexities(output: Path) -> dict[str, float]:
    """Return the perplexities in the manifest of the one attacked student in a folder."""
    return read_manifest(student(output, attacked=True), "student").config["perplexity"]


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file of a provider, whose student was attacked by one process in `runs`."""
    folder = tmp_path_factory.mktemp("attack")
    file = tiny.write_run(folder)
    done = run("distill", file, f"--output={folder / 'runs'}", *STUDENT, *ATTACKS)
    assert done.returncode == 0, done.stderr
    return file


def test_more_distillation_brings_the_student_nearer_to_its_teacher(provider: Path) -> None:
    runs = provider.parent / "runs"
    found = perplexities(runs)
    attacked = [f"student after {tokens} more tokens" for tokens in (500, 2560)]
    assert list(found) == ["teacher", "student", *attacked]
    assert found[attacked[1]] < found[attacked[0]] < found["student"]

    artifact = student(runs, attacked=True)
    held_out = read_manifest(artifact, "student").config["held_out"]
    assert found["teacher"] == math.exp(held_out["teacher_lm"])
    assert found["student"] == math.exp(held_out["lm"])
    # `verify` tells the same, and the card leads there.
    assert verify(artifact)["perplexity"] == found
    assert "prints what attacks on it have reached" in (artifact / "README.md").read_text()
    assert not (artifact.parent / "checkpoints").exists()
    # 4 and 20 steps, counted on.
    lines = (artifact.parent / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(24))


def test_a_finished_student_is_attacked_as_it_is(
    provider: Path, tmp_path: Path, main: Callable
) -> None:
    command = ("distill", provider, f"--output={tmp_path}", *STUDENT, ATTACKS[1])
    assert main(*command)[0] == 0
    before = student(tmp_path, attacked=False)
    assert list(verify(before)["perplexity"]) == ["teacher", "student"]
    # A student that was signed and handed out is attacked later.
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-f", key, "-N", ""], check=True)
    assert main("sign", before, "--key", key)[0] == 0
    code, _, err = main(*command, ATTACKS[0])
    assert code == 0, err
    assert f"distill is finished: {before.parent}" in err

    attacked = student(tmp_path, attacked=True)
    assert verify(attacked)["signature"] == "not signed"
    files = {file.name for file in before.iterdir()} - {"post_dist.json", "post_dist.json.sig"}
    assert {file.name for file in attacked.iterdir()} == files | {"post_dist.json"}
    assert all((before / each).read_bytes() == (attacked / each).read_bytes() for each in files)
    # A prompt that was tuned on the one belongs to the other.
    digests = {read_manifest(each, "student").digest for each in (before, attacked)}
    assert len(digests) == 1
    code, out, err = main("distill", provider, f"--output={tmp_path}", *STUDENT, *ATTACKS, "--json")
    assert code == 0, err
    assert json.loads(out)["artifact"] == str(attacked)


@pytest.mark.parametrize("stage", [2, 3])
def test_several_ranks_attack_as_one_does(provider: Path, tmp_path: Path, stage: int) -> None:
    sharded = f"--set=engine.zero_stage={stage}"
    command = ("distill", provider, f"--output={tmp_path}", sharded, *STUDENT, *ATTACKS)
    made = run_ranks(*command, preparations=("nothing", "on a node that remembers what it missed"))
    assert [rank.returncode for rank in made] == [0, 0], made[1].stderr
    wanted = perplexities(provider.parent / "runs")
    assert perplexities(tmp_path) == pytest.approx(wanted, rel=1e-3)


def test_a_trained_head_is_not_taken_for_the_teacher_s(
    tmp_path: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = []
    real = attack.student_engine

    def student_engine(*given: Any) -> Any:
        heads.append(given[-1].weight.clone())
        return real(*given)

    monkeypatch.setattr(attack, "student_engine", student_engine)
    file = tiny.write_run(tmp_path)
    trained = ("--set=student.freeze_head=false", "--set=student.freeze_embeddings=false")
    code, _, err = main("distill", file, f"--output={tmp_path / 'out'}", *trained, *ATTACKS)
    assert code == 0, err
    cpu = torch.device("cpu")
    head = load_whole(tmp_path / "teacher", "fp32", cpu).head_module.weight
    own = load_whole(student(tmp_path / "out", attacked=True), "fp32", cpu).head_module.weight
    assert [torch.equal(each, head) for each in heads] == [True, True]
    assert not torch.equal(own, head)


def test_a_killed_attack_goes_on_where_it_was(provider: Path, tmp_path: Path) -> None:
    command = ("distill", provider, f"--output={tmp_path}", *STUDENT, *ATTACKS)
    # The student has 6 steps and the first attack 4, so the second one dies in its seventh step.
    killed, other = run_ranks(*command, preparations=("killed in its 17th step", "nothing"))
    assert killed.returncode == -signal.SIGKILL
    assert other.returncode not in (0, None)
    (folder,) = tmp_path.rglob("distill-attack-*/checkpoints")
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
    assert ok or "does not hold perplexities" in found["problems"][0]
