"""`post-dist bench fabric` on two real ranks, and the plan that reckons with it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from post_dist.bench.fabric import fit_link


def test_a_machine_s_own_figures_are_a_hardware_file(tmp_path: Path, post_dist: Callable, main: Callable) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29625", "-m")
    done = post_dist("bench", "fabric", "--write", tmp_path / "mine.yaml", "--json", launcher=launcher)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ranks"] == 2
    times = {(entry["collective"], entry["received_bytes"]): entry["seconds"] for entry in found["collectives"]["node"]}
    assert len(times) == 16
    assert times["all-gather", 1 << 26] > times["all-gather", 1 << 12]
    assert 0.01 < found["hardware"]["teraflops"]["fp32"] < 10
    run = tiny.write_run(tmp_path)
    options = ("--gpu=measured", f"--hardware={tmp_path / 'mine.yaml'}", "--gpus-per-node=2", "--json")
    code, out, err = main("plan", run, *options)
    assert code == 0, err
    distill = json.loads(out)["stages"][0]
    assert distill["step_seconds"] == pytest.approx(sum(distill["seconds"].values())), "one after another"


def test_the_fit_finds_latency_and_bandwidth() -> None:
    sizes = [2.0**power for power in range(10, 27, 2)]
    alpha, beta = fit_link(sizes, [3e-5 + size / 2e9 for size in sizes])
    assert alpha == pytest.approx(3e-5, rel=1e-6)
    assert beta == pytest.approx(2e9, rel=1e-6)
