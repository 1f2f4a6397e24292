"""How a process ends, and when a watchdog may not end it."""

import signal
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


STOPPED = """
import sys, threading, time
from contextlib import nullcontext
from post_dist.runtime import stop
from post_dist.runtime.watchdog import phase
stop._SECONDS_TO_LEAVE = 1.0
stop.listen()
stop.leave_in_seconds()
phase("reading the weights")
print("ready", flush=True)
lock = threading.Lock()
lock.acquire()
with stop.saving() if sys.argv[1] == "saves" else nullcontext():
    lock.acquire(timeout=3)
print("done", flush=True)
"""


@pytest.mark.parametrize(("work", "code"), [("waits", 6), ("saves", 0)])
def test_a_signal_ends_work_that_nobody_saves(work: str, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, work],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert (out, "stopped by SIGUSR2 in: reading the weights" in err) == (
        ("", True) if work == "waits" else ("done\n", False)
    )


ORPHAN = """
import os, signal, subprocess, sys
from post_dist.runtime.launcher import end_with_launcher
if sys.argv[1] == "launcher":
    rank = subprocess.Popen([sys.executable, "-c", open(sys.argv[2]).read(), "rank"])
    rank.wait()
signal.signal(signal.SIGTERM, lambda *given: os._exit(print("told", flush=True) or 0))
end_with_launcher({"TORCHELASTIC_RUN_ID": "x"})
print("ready", flush=True)
signal.pause()
"""


def test_a_launcher_that_is_killed_takes_its_ranks_along(tmp_path: Path) -> None:
    (tmp_path / "program").write_text(ORPHAN)
    launcher = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, "launcher", tmp_path / "program"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout.readline() == "ready\n"
    launcher.kill()
    # The rank has the same standard output, which ends with it.
    assert launcher.communicate(timeout=30)[0] == "told\n"


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
