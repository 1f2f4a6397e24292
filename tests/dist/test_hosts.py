"""Several hosts without ssh: the deepspeed launcher runs on each, here twice on one machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny


def losses(folder: Path) -> list[float]:
    (metrics,) = folder.glob("tiny/distill-*/metrics.jsonl")
    return [json.loads(line)["ce"] for line in metrics.read_text().splitlines()]


def test_two_hosts_without_ssh_give_one_process_s_losses(tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    common = [
        "deepspeed",
        "--hostfile",
        str(hostfile),
        "--no_ssh",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        "29695",
    ]
    work = ["--module", "post_dist", "distill", str(run), f"--output={tmp_path / 'two'}"]
    hosts = [
        subprocess.Popen(
            [*common, "--node_rank", str(rank), *work],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [host.communicate(timeout=500)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said[0][-3000:]
    alone = [sys.executable, "-m", "post_dist", "distill", str(run), f"--output={tmp_path / 'one'}"]
    subprocess.run(alone, env=environment, check=True, capture_output=True, timeout=500)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_host_of_one_rank_cannot_offload_what_it_keeps_whole(tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path)
    place = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29696",
        "OMP_NUM_THREADS": "1",
    }
    work = [
        sys.executable,
        "-m",
        "post_dist",
        "distill",
        str(run),
        "--set=engine.shard_group=node",
        "--set=engine.offload=cpu",
    ]
    hosts = [
        subprocess.Popen(
            work,
            env=os.environ | place | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [host.communicate(timeout=500)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [2, 2], said[0][-3000:]
    assert "engine.shard_group is one rank here, which keeps frozen models whole" in said[0]
