"""`post-dist bench fabric` on two real ranks, and the plan that reads its hardware file."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from started import run_ranks

from post_dist.bench.fabric import fit_link

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
COLLECTIVES_OF_A_LINK = 16
"""Two collectives at eight sizes."""


def test_the_measured_rates_make_a_hardware_file(
    tmp_path: Path, post_dist: Callable, main: Callable
) -> None:
    hardware_file = tmp_path / "mine.yaml"
    launcher = (*TORCHRUN, "--master-port=29625", "-m")
    done = post_dist("bench", "fabric", "--write", hardware_file, "--json", launcher=launcher)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["ranks"] == 2

    seconds = {}
    for entry in measured["collectives"]["node"]:
        seconds[entry["collective"], entry["received_bytes"]] = entry["seconds"]
    assert len(seconds) == COLLECTIVES_OF_A_LINK
    assert seconds["all-gather", 1 << 26] > seconds["all-gather", 1 << 12]

    hardware = measured["hardware"]
    host_memory_gib = hardware["host"]["memory_gib"]
    assert hardware["memory_gib"] == host_memory_gib / 2, "two ranks share the host's memory"
    assert 0.01 < hardware["teraflops"]["fp32"] < 10

    run = tiny.write_run(tmp_path)
    options = ("--gpu=measured", f"--hardware={hardware_file}", "--gpus-per-node=2", "--json")
    code, out, err = main("plan", run, *options)
    assert code == 0, err
    distill = json.loads(out)["stages"][0]
    parts = sum(distill["seconds"].values())
    assert distill["step_seconds"] == pytest.approx(parts), "nothing overlaps on a CPU"


def test_ranks_on_two_nodes_measure_the_network_under_any_launcher() -> None:
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29626"}
    command = [sys.executable, "-m", "post_dist", "bench", "fabric", "--json"]
    nodes = []
    for rank in range(2):
        environment = os.environ | common | address | {"RANK": str(rank)}
        nodes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    printed = [node.communicate(timeout=500)[0] for node in nodes]
    measured = json.loads(printed[0])
    assert measured["hardware"]["node"]["gpus"] == 1
    collectives = measured["collectives"]
    assert list(collectives) == ["node", "network"]
    assert len(collectives["node"]) == 0
    assert len(collectives["network"]) == COLLECTIVES_OF_A_LINK


def test_the_ranks_are_checked_together(tmp_path: Path) -> None:
    ranks = run_ranks("doctor", tmp_path / "runs", "--ranks", "--gpu=h100", "--json")
    assert ranks[1].stdout == ""
    checks = {each["name"]: each for each in json.loads(ranks[0].stdout)["checks"]}
    for name in ("ranks", "versions", "clocks", "shared folder", "locks"):
        assert checks[name]["ok"], checks[name]
    assert checks["ranks"]["found"].startswith("2 on 1 hosts")
    # gloo on a processor is slower than NVLink.
    assert not checks["links"]["ok"]
    assert "the plan assumes 337.50" in checks["links"]["found"]
    assert ranks[0].returncode == 3
    assert list((tmp_path / "runs").iterdir()) == []


def test_the_fit_finds_latency_and_bandwidth() -> None:
    sizes = [2.0**power for power in range(10, 27, 2)]
    latency_seconds, bytes_per_second = fit_link(sizes, [3e-5 + size / 2e9 for size in sizes])
    assert latency_seconds == pytest.approx(3e-5, rel=1e-6)
    assert bytes_per_second == pytest.approx(2e9, rel=1e-6)
