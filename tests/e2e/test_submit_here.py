"""`post-dist submit --local`: submitit's processes on this machine, without a Slurm."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tiny
import yaml


def write_run(folder: Path, **cluster: object) -> Path:
    run = tiny.write_run(folder)
    run.write_text(yaml.safe_dump(yaml.safe_load(run.read_text()) | {"cluster": cluster}))
    return run


def test_two_tasks_are_two_ranks(tmp_path: Path, post_dist: Callable) -> None:
    done = post_dist(
        "submit", write_run(tmp_path, distill={"tasks_per_node": 2}), "distill", "--local", "--json"
    )
    assert done.returncode == 0, done.stderr
    (job,) = json.loads(done.stdout)["jobs"]
    assert list(tmp_path.glob("runs/tiny/distill-*/artifact"))
    assert (
        "rank 0 of 2 on cpu" in Path(job["log"]).with_name(f"{job['job_id']}_0_log.err").read_text()
    )


def test_a_failure_is_told_with_its_log(tmp_path: Path, post_dist: Callable) -> None:
    done = post_dist(
        "submit",
        write_run(tmp_path),
        "distill",
        "--local",
        "--set",
        "corpus.held_out_sequences=10000",
    )
    assert done.returncode == 3
    log = Path(done.stderr.rpartition("its log: ")[2].strip())
    assert "to be held out" in log.read_text()


def test_a_job_here_is_set_up_and_has_no_time_limit(tmp_path: Path, post_dist: Callable) -> None:
    setup = [
        "shopt -s expand_aliases",
        "export LIMIT=$SUBMITIT_LOCAL_TIMEOUT_S",
        'echo "may take $LIMIT s"',
    ]
    run = write_run(tmp_path, setup=setup, time_minutes=1, signal_seconds=20)
    done = post_dist("submit", run, "distill", "--local", "--json", "--set", "distill.steps=1")
    assert done.returncode == 0, done.stderr
    said = Path(json.loads(done.stdout)["jobs"][0]["log"]).read_text()
    assert int(re.search(r"may take (\d+) s", said)[1]) > 10_000_000


def test_a_job_here_that_is_stopped_goes_on(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    command = [
        sys.executable,
        "-m",
        "post_dist",
        "submit",
        str(run),
        "distill",
        "--local",
        "--set=distill.steps=100000",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as submitted:
        try:
            while not any(
                path.read_text() for path in tmp_path.glob("runs/tiny/distill-*/metrics.jsonl")
            ):
                assert submitted.poll() is None
                time.sleep(0.1)
            (log,) = tmp_path.glob("runs/tiny/slurm/*_0_log.out")
            os.kill(int(log.name.partition("_")[0]), signal.SIGTERM)
            said = submitted.communicate(timeout=60)[1]
        finally:
            submitted.kill()
    assert submitted.returncode == 6, said
    assert "distill was stopped\n  the same command goes on" in said


def test_several_nodes_are_refused(tmp_path: Path, post_dist: Callable) -> None:
    done = post_dist("submit", write_run(tmp_path, transfer={"nodes": 2}), "pipeline", "--local")
    assert done.returncode == 2
    assert "cluster.transfer.nodes is 2; --local has one node" in done.stderr
    assert not (tmp_path / "runs").exists(), "before the first job"
