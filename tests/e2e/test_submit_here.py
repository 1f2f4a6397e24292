"""`post-dist submit --local`: submitit's processes on this machine, without a Slurm."""

import json
from collections.abc import Callable
from pathlib import Path

import tiny
import yaml


def write_run(folder: Path, **cluster: object) -> Path:
    run = tiny.write_run(folder)
    run.write_text(yaml.safe_dump(yaml.safe_load(run.read_text()) | {"cluster": cluster}))
    return run


def test_two_tasks_are_two_ranks(tmp_path: Path, post_dist: Callable) -> None:
    done = post_dist("submit", write_run(tmp_path, distill={"tasks_per_node": 2}), "distill", "--local", "--json")
    assert done.returncode == 0, done.stderr
    (job,) = json.loads(done.stdout)["jobs"]
    assert list(tmp_path.glob("runs/tiny/distill-*/artifact"))
    assert "rank 0 of 2 on cpu" in Path(job["log"]).with_name(f"{job['job_id']}_0_log.err").read_text()


def test_a_failure_is_told_with_its_log(tmp_path: Path, post_dist: Callable) -> None:
    done = post_dist("submit", write_run(tmp_path), "distill", "--local", "--set", "corpus.held_out_sequences=10000")
    assert done.returncode == 3
    log = Path(done.stderr.rpartition("its log: ")[2].strip())
    assert "to be held out" in log.read_text()


def test_several_nodes_are_refused(tmp_path: Path, post_dist: Callable) -> None:
    done = post_dist("submit", write_run(tmp_path, distill={"nodes": 2}), "distill", "--local")
    assert done.returncode == 2
    assert "cluster.distill.nodes is 2; --local has one node" in done.stderr
