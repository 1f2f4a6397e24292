"""`post-dist bench fabric` on two real ranks, and the plan that reckons with it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from post_dist.bench.fabric import fit_link


def test_a_machine_s_own_figures_are_a_hardware_file(
    tmp_path: Path, post_dist: Callable, main: Callable
) -> None:
    launcher = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=29625",
        "-m",
    )
    done = post_dist(
        "bench", "fabric", "--write", tmp_path / "mine.yaml", "--json", launcher=launcher
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ranks"] == 2
    times = {
        (entry["collective"], entry["received_bytes"]): entry["seconds"]
        for entry in found["collectives"]["node"]
    }
    assert len(times) == 16
    assert times["all-gather", 1 << 26] > times["all-gather", 1 << 12]
    assert found["hardware"]["memory_gib"] == found["hardware"]["host"]["memory_gib"] / 2, (
        "two ranks share the host's memory"
    )
    assert 0.01 < found["hardware"]["teraflops"]["fp32"] < 10
    run = tiny.write_run(tmp_path)
    options = (
        "--gpu=measured",
        f"--hardware={tmp_path / 'mine.yaml'}",
        "--gpus-per-node=2",
        "--json",
    )
    code, out, err = main("plan", run, *options)
    assert code == 0, err
    distill = json.loads(out)["stages"][0]
    assert distill["step_seconds"] == pytest.approx(sum(distill["seconds"].values())), (
        "one after another"
    )


def test_the_network_is_told_from_a_node_s_link_under_any_launcher() -> None:
    common = os.environ | {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29626",
    }
    command = [sys.executable, "-m", "post_dist", "bench", "fabric", "--json"]
    nodes = [
        subprocess.Popen(
            command, env=common | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [node.communicate(timeout=200)[0] for node in nodes]
    found = json.loads(said[0])
    assert found["hardware"]["node"]["gpus"] == 1
    assert {name: len(link) for name, link in found["collectives"].items()} == {
        "node": 0,
        "network": 16,
    }


def test_the_fit_finds_latency_and_bandwidth() -> None:
    sizes = [2.0**power for power in range(10, 27, 2)]
    alpha, beta = fit_link(sizes, [3e-5 + size / 2e9 for size in sizes])
    assert alpha == pytest.approx(3e-5, rel=1e-6)
    assert beta == pytest.approx(2e9, rel=1e-6)
