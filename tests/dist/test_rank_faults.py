"""What two ranks do when one of them dies, hangs or is asked to stop: real processes over gloo."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny


def start_ranks(run: Path, *settings: str) -> list[subprocess.Popen]:
    """Two ranks of distill in the plain environment, without a launcher that would clean up after them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "post_dist", "distill", str(run), *(f"--set={setting}" for setting in settings)]
    return [
        subprocess.Popen(command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]


def wait_for_a_checkpoint(folder: Path, ranks: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob("runs/tiny/*/checkpoints/step-*")):
        assert all(rank.poll() is None for rank in ranks), [rank.communicate()[1][-2000:] for rank in ranks]
        assert time.monotonic() < deadline
        time.sleep(0.05)


SETTINGS = ("distill.steps=100000",)


def test_a_rank_that_stands_still_is_named_by_the_one_that_waits(tmp_path: Path) -> None:
    ranks = start_ranks(tiny.write_run(tmp_path), *SETTINGS, "engine.hang_timeout_seconds=15")
    try:
        wait_for_a_checkpoint(tmp_path, ranks)
        ranks[1].send_signal(signal.SIGSTOP)
        start = time.monotonic()
        said = ranks[0].communicate(timeout=60)[1]
        took = time.monotonic() - start
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    print(f"ended {took:.1f} s after the other rank was stopped")
    assert ranks[0].returncode == 3
    assert re.search(r"rank 0 has stood still for 15 s in: distill step \d+: ", said), said[-3000:]
    assert "most recent call first" in said, "the stacks are shown"
    assert took < 30


def test_a_rank_that_dies_ends_the_other(tmp_path: Path) -> None:
    ranks = start_ranks(tiny.write_run(tmp_path), *SETTINGS, "engine.hang_timeout_seconds=20")
    try:
        wait_for_a_checkpoint(tmp_path, ranks)
        ranks[1].kill()
        start = time.monotonic()
        ranks[0].communicate(timeout=60)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    print(f"ended {time.monotonic() - start:.1f} s after the other rank was killed")
    assert ranks[0].returncode not in (0, -signal.SIGKILL)


@pytest.mark.parametrize("asked", [0, 1])
def test_one_rank_that_is_asked_to_stop_takes_the_other_along(tmp_path: Path, asked: int) -> None:
    run = tiny.write_run(tmp_path)
    ranks = start_ranks(run, *SETTINGS)
    try:
        wait_for_a_checkpoint(tmp_path, ranks)
        ranks[asked].send_signal(signal.SIGUSR2)
        said = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [6, 6], said
    assert "stopped" in said[0]
    steps = [int(path.name.removeprefix("step-")) for path in tmp_path.glob("runs/tiny/*/checkpoints/step-*")]
    assert f"is saved at step {max(steps)} of 100000" in said[0]


def spoiled(tmp_path: Path, first: int, last: int, *settings: str) -> subprocess.CompletedProcess:
    run = tiny.write_run(tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29690"]
    command = [*launcher, str(Path(__file__).with_name("spoiled_distill.py")), str(first), str(last), str(run)]
    command += [f"--set={setting}" for setting in settings]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_loss_that_is_no_number_on_one_rank_is_passed_over_by_all(tmp_path: Path, zero_stage: int) -> None:
    done = spoiled(tmp_path, 3, 3, "distill.steps=6", f"engine.zero_stage={zero_stage}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "distill step 2: the loss is not finite on rank 1: a micro-batch is passed over" in done.stderr
    (metrics,) = tmp_path.glob("runs/tiny/distill-*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert all(math.isfinite(line[term]) for line in lines for term in ("ce", "lm", "cos"))
    assert list(tmp_path.glob("runs/tiny/distill-*/artifact"))


def test_a_loss_that_stays_no_number_ends_the_run(tmp_path: Path) -> None:
    done = spoiled(tmp_path, 4, 1000, "distill.steps=50")
    assert done.returncode != 0
    assert "the loss was not finite on rank 1 at step" in done.stderr
    assert not list(tmp_path.glob("runs/tiny/distill-*/artifact"))
