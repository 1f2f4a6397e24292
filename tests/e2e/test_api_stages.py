"""The Python API on small models: the notebook's script, interruptions, and two ranks."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

import post_dist
from post_dist.config.assets import asset
from post_dist.errors import Interrupted
from post_dist.runtime import watchdog

PRIVATE = [
    "privacy.enabled=true",
    "privacy.declared_examples=160",
    "privacy.noise_multiplier=1",
    "privacy.steps=4",
]


def test_the_notebook_runs_and_the_command_line_finds_its_work_done(
    tmp_path: Path, post_dist: Callable
) -> None:
    run = tiny.write_run(tmp_path)
    settings = ["evaluate.baselines=[]", *PRIVATE]
    done = subprocess.run(
        [sys.executable, asset("examples/notebook.py"), run, *settings],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tiny: 5 prompt tokens on" in done.stdout
    assert "unexplained_share: " in done.stdout
    assert "transferred" in done.stdout
    assert "5 vectors of width 32 for the template 'Review: {text} It was'" in done.stdout
    claimed = float(done.stdout.rpartition("epsilon: ")[2])

    options = [f"--set={setting}" for setting in settings]
    again = post_dist("evaluate", run, *options, "--json")
    assert again.returncode == 0, again.stderr
    assert " starts in " not in again.stderr
    rows = {row["name"]: row for row in json.loads(again.stdout)["rows"]}
    assert rows["transferred"]["epsilon"] == claimed > 0


def test_results_are_typed_and_a_finished_stage_gives_the_same(tmp_path: Path) -> None:
    config = post_dist.load_run(tiny.write_run(tmp_path), ["evaluate.baselines=[]"])
    student = post_dist.distill(config)
    assert student.artifact.parent == student.path
    assert set(student.held_out) >= {"unexplained_share", "last_position_kl_nats"}
    tuned = post_dist.tune(config)
    assert (tuned.epsilon, tuned.delta) == (None, None)
    evaluation = post_dist.pipeline(config)
    assert evaluation.report.is_file()
    assert evaluation.table["rows"][0]["name"] == "zero-shot"
    assert "zero-shot" in str(evaluation)
    assert post_dist.distill(config) == student
    assert watchdog._Watch.paused, "a notebook that waits for its user does not hang"
    assert "MASTER_PORT" not in os.environ, "a command from the notebook has a group of its own"


def test_modes_around_a_call_change_nothing(tmp_path: Path) -> None:
    """A notebook may have switched gradients off, or autocast on."""
    run = tiny.write_run(tmp_path)

    def weights(output: str) -> list[bytes]:
        config = post_dist.load_run(run, output=tmp_path / output)
        files = (
            post_dist.distill(config).artifact / "model.safetensors",
            post_dist.tune(config).artifact / "adapter_model.safetensors",
        )
        return [file.read_bytes() for file in files]

    expected = weights("plain")
    with torch.autocast("cpu", torch.bfloat16):
        assert weights("autocast") == expected
    with torch.inference_mode():
        assert weights("inference") == expected


def test_ctrl_c_saves_and_the_next_call_resumes(tmp_path: Path) -> None:
    config = post_dist.load_run(tiny.write_run(tmp_path), ["distill.steps=100000"])
    before = signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        while not list(tmp_path.glob("runs/tiny/*/checkpoints/step-*")):
            time.sleep(0.02)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Interrupted, match="stopped by SIGINT"):
        post_dist.distill(config)
    assert signal.getsignal(signal.SIGINT) == before
    assert list(tmp_path.glob("runs/tiny/*/checkpoints/step-*"))


TWO_STAGES = """
import os
import sys
from pathlib import Path
import torch
import post_dist
config = post_dist.load_run(sys.argv[1])
student = post_dist.distill(config)
prompt = post_dist.tune(config)
result = Path(sys.argv[2], f"rank{os.environ['RANK']}.txt")
result.write_text(f"{student.artifact} {prompt.artifact}")
torch.distributed.destroy_process_group()
"""


def test_all_ranks_of_a_launcher_get_the_results(tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(TWO_STAGES)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "--master-port=29671", script, run, tmp_path],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = (tmp_path / "rank0.txt").read_text()
    assert one == (tmp_path / "rank1.txt").read_text()
    assert [Path(path).is_dir() for path in one.split()] == [True, True]
