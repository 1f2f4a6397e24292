"""How a process ends, and when a watchdog may not end it."""

import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

from post_dist.config.schema import RunConfig, Teacher
from post_dist.errors import InputError
from post_dist.runtime import watchdog
from post_dist.runtime.distributed import World
from post_dist.runtime.logs import log_file
from post_dist.stages.run_inputs import RunInputs

PROGRAM = """
import atexit, sys, threading, time
from post_dist.runtime.stop import end_process
atexit.register(print, "tidied up")
"""
ENDS = {
    "past a thread that does not end": (
        "threading.Thread(target=time.sleep, args=(600,)).start(); end_process(6)"
    ),
    "when the interpreter would": "atexit.register(end_process, 6); sys.exit(0)",
}


@pytest.mark.parametrize("how", ENDS)
def test_a_process_ends_tidily(how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + ENDS[how]],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (6, "tidied up\n", "")


def test_a_download_may_take_as_long_as_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors").touch()
    watched = []

    def download(*_: object, **__: object) -> str:
        watched.append(not watchdog._Watch.paused)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(watchdog._Watch, "paused", False)
    config = RunConfig(name="a", teacher=Teacher(path="someone/something", revision="0" * 40))
    world = World(0, 1, 0, "none", torch.device("cpu"))
    assert RunInputs(config, world).teacher == tmp_path
    assert not any(watched)
    assert watched
    assert not watchdog._Watch.paused


def test_the_log_of_a_stage_holds_its_error_and_no_foreign_words(tmp_path: Path) -> None:
    for error in (InputError("the task is wrong", "change it"), ValueError("secret")):
        with pytest.raises(type(error)), log_file(tmp_path, 0):
            raise error
    text = (tmp_path / "logs/rank0.log").read_text()
    assert "ERROR post_dist: the task is wrong\n  change it\n" in text
    assert "ERROR post_dist: internal error: ValueError\n" in text
    assert "secret" not in text
