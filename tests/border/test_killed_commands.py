"""Commands that are killed where it hurts most, and what the next command finds."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from border import test_prompts
from border.test_signatures import ssh_keygen
from faults import at_call, fork_command

from post_dist.artifacts.manifest import SIGNATURE
from post_dist.serving import model
from post_dist.verify import verify


def killed(arguments: list[object], place: Path, prepare: Callable[[], None]) -> None:
    """Run a command that dies where `prepare` says."""
    child = fork_command([str(each) for each in arguments], {}, place / "said", prepare)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, (place / "said").read_text()


def test_a_killed_signature_is_made_again(tmp_path: Path, main: Callable) -> None:
    ssh_keygen("-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key")
    prompt = shutil.copytree(test_prompts.HONEST, tmp_path / "prompt")
    before = {path.name for path in prompt.iterdir()}
    command = ["sign", prompt, "--key", tmp_path / "key"]
    killed(command, tmp_path, lambda: at_call(Path, "rename", 1, before=True))
    code, _, err = main(*command)
    assert code == 0, err
    assert verify(prompt)["ok"]
    assert {path.name for path in prompt.iterdir()} == before | {SIGNATURE}


def test_the_student_of_a_killed_prediction_is_removed_by_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    student = tiny.write_student(tmp_path / "student")
    prompt = test_prompts.HONEST
    (tmp_path / "texts.txt").write_text("a film\n")
    command = ["predict", prompt, tmp_path / "texts.txt", "--model", student]
    killed(command, tmp_path, lambda: at_call(model, "check_made_for", 1, before=True))
    (left,) = temporary.iterdir()
    os.utime(left, (0, 0))
    assert verify(prompt)["ok"]
    assert list(temporary.iterdir()) == []
