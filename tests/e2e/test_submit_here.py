"""`post-dist submit --local`: submitit's processes on this machine, without a Slurm."""

import contextlib
import itertools
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import tiny
import yaml


def write_run(folder: Path, **cluster: object) -> Path:
    run = tiny.write_run(folder)
    fields = yaml.safe_load(run.read_text())
    fields["cluster"] = cluster
    run.write_text(yaml.safe_dump(fields))
    return run


@contextlib.contextmanager
def long_distillation(folder: Path) -> Iterator[subprocess.Popen]:
    """A submission on this machine that is in the middle of its steps."""
    command = [sys.executable, "-m", "post_dist", "submit", str(write_run(folder)), "distill"]
    options = ["--local", "--set=distill.steps=100000"]
    submitted = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    try:
        while not any(
            path.read_text() for path in folder.glob("runs/tiny/distill-*/metrics.jsonl")
        ):
            assert submitted.poll() is None
            time.sleep(0.1)
        yield submitted
    finally:
        submitted.kill()
        submitted.communicate()


def controller(folder: Path) -> int:
    """The process of submitit that starts the tasks."""
    (log,) = folder.glob("runs/tiny/slurm/*_0_log.out")
    return int(log.name.partition("_")[0])


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_two_tasks_are_two_ranks(tmp_path: Path, post_dist: Callable) -> None:
    run = write_run(tmp_path, distill={"tasks_per_node": 2})
    done = post_dist("submit", run, "distill", "--local", "--json")
    assert done.returncode == 0, done.stderr
    (job,) = json.loads(done.stdout)["jobs"]
    (artifact,) = tmp_path.glob("runs/tiny/distill-*/artifact")
    log = Path(job["log"])
    assert str(artifact) in log.read_text().splitlines(), "rank 0 prints the result"
    errors = log.with_name(f"{job['job_id']}_0_log.err").read_text()
    assert "rank 0 of 2 on cpu" in errors


def test_a_failure_is_told_with_its_log(tmp_path: Path, post_dist: Callable) -> None:
    run = write_run(tmp_path)
    settings = ["--set", "corpus.held_out_sequences=10000"]
    done = post_dist("submit", run, "distill", "--local", *settings)
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
    text = Path(json.loads(done.stdout)["jobs"][0]["log"]).read_text()
    assert int(re.search(r"may take (\d+) s", text)[1]) > 10_000_000


def test_a_job_here_that_is_stopped_resumes(tmp_path: Path) -> None:
    with long_distillation(tmp_path) as submitted:
        os.kill(controller(tmp_path), signal.SIGTERM)
        error = submitted.communicate(timeout=60)[1]
    assert submitted.returncode == 6, error
    assert "distill was stopped\n  the same command resumes" in error


def test_a_job_here_saves_and_ends_when_its_submitter_is_killed(tmp_path: Path) -> None:
    with long_distillation(tmp_path) as submitted:
        process = controller(tmp_path)
        submitted.kill()
        submitted.wait()
        end = time.monotonic() + 60
        while is_running(process) and time.monotonic() < end:
            time.sleep(0.1)
    assert not is_running(process)
    assert list(tmp_path.glob("runs/tiny/distill-*/checkpoints/step-*"))


def test_several_nodes_are_refused(tmp_path: Path, post_dist: Callable) -> None:
    done = post_dist("submit", write_run(tmp_path, transfer={"nodes": 2}), "pipeline", "--local")
    assert done.returncode == 2
    assert "cluster.transfer.nodes is 2; --local has one node" in done.stderr
    assert not (tmp_path / "runs").exists(), "before the first job"


def test_logs_and_pickles_of_private_jobs_are_for_their_owner(
    tmp_path: Path, post_dist: Callable
) -> None:
    """Others may not read private scores, and may not put a pickle where a job looks for it."""
    run = write_run(tmp_path)
    settings = ["--set=evaluate.baselines=[]", "--set=distill.steps=1", "--set=tune.steps=1"]
    before = os.umask(0)
    try:
        done = post_dist("submit", run, "pipeline", "--local", *settings, "--set=transfer.steps=1")
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "runs/tiny/slurm"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        provider = yaml.safe_load(run.read_text())
        for section in ("private_task", "privacy", "tune", "evaluate"):
            del provider[section]
        run.write_text(yaml.safe_dump(provider | {"name": "public"}))
        assert post_dist("submit", run, "corpus", "--local").returncode == 0
        folder = tmp_path / "runs/public/slurm"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    finally:
        os.umask(before)
    logs = "".join(path.read_text() for path in tmp_path.glob("runs/tiny/slurm/*_log.out"))
    assert "report: " in logs
    assert "transferred" not in logs, "the table is in the page"


def test_options_that_contradict_each_other_run_nothing(tmp_path: Path, main: Callable) -> None:
    run = write_run(tmp_path)
    pairs = itertools.combinations(("--print", "--test-only", "--local"), 2)
    for pair in pairs:
        code, _, err = main("submit", run, "tune", *pair)
        assert code == 2
        assert f"{' and '.join(pair)} do not go together" in err
    assert not (tmp_path / "runs").exists()
