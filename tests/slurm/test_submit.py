"""`post-dist submit` on a real Slurm: chains, time limits, nodes that crash, ranks that die."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import tiny
from cluster import Cluster, in_time
from submissions import (
    artifact,
    environment,
    followed,
    let_the_time_run_out,
    logs,
    node_of,
    processes_of,
    steps_of,
    submit,
    write_long_corpus,
    write_run,
)

from post_dist.config.cluster import ClusterStage


def bench(slurm: Cluster, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "post_dist", "bench", *map(str, arguments)]
    return subprocess.run(
        command, env=environment(slurm), capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture(scope="module")
def chained(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A pipeline as four jobs, and the lines of following them."""
    folder = tmp_path_factory.mktemp("chained")
    done = submit(slurm, write_run(folder), "pipeline", "--wait")
    assert done.returncode == 0, done.stderr + logs(folder)
    return folder, done.stderr


@pytest.mark.timeout(900)
def test_a_pipeline_is_a_chain_of_jobs(chained: tuple[Path, str], post_dist: Callable) -> None:
    folder, output = chained
    ends = re.findall(r"(\w+) \(job \d+\): COMPLETED", output)
    assert ends == ["corpus", "distill", "tune", "transfer", "evaluate"]
    for stage in ends[1:4]:
        assert post_dist("verify", artifact(folder, stage)).returncode == 0
    environments = {
        stage: logs(folder).count(f"of {ranks} on cpu (launcher: srun)")
        for stage, ranks in (("distill", 4), ("transfer", 2))
    }
    assert environments == {"distill": 1, "transfer": 1}


def test_what_slurm_would_refuse_is_refused_before_anything_is_queued(
    slurm: Cluster, tmp_path: Path
) -> None:
    for place, wanted in (
        ({"partition": "nowhere"}, "Invalid partition name"),
        ({"nodes": 9}, "Requested node configuration is not available"),
    ):
        refused = submit(slurm, write_run(tmp_path, cluster={"transfer": place}), "pipeline")
        assert refused.returncode == 2
        assert "Slurm refuses the job for transfer" in refused.stderr
        assert wanted in refused.stderr
    assert slurm.run("squeue", "--noheader").stdout == ""


def test_test_only_and_print_queue_nothing_and_print_is_what_is_sent(
    slurm: Cluster, tmp_path: Path
) -> None:
    run = write_run(tmp_path)
    answer = submit(slurm, run, "pipeline", "--test-only")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("to start at") == 5
    printed = submit(slurm, run, "distill", "--print").stdout
    assert slurm.run("squeue", "--noheader").stdout == ""
    submitted = json.loads(submit(slurm, run, "distill", "--json").stdout)["jobs"][0]
    slurm.run("scancel", submitted["job_id"])
    (sent,) = tmp_path.glob(f"runs/tiny/slurm/{submitted['job_id']}_submission.sh")
    assert sent.read_text().strip() == printed.strip()


def test_the_files_for_sbatch_by_hand_are_ones_that_slurm_takes(slurm: Cluster) -> None:
    files = sorted((Path(__file__).parents[2] / "slurm").glob("*.sbatch"))
    assert len(files) == len(get_args(ClusterStage))
    for file in files:
        assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
        asked = slurm.run("sbatch", "--test-only", file, "RUN.yaml")
        assert asked.returncode == 0, asked.stderr


def test_a_task_of_a_file_by_hand_has_the_script_s_environment(
    slurm: Cluster, tmp_path: Path
) -> None:
    for place, text in (
        ("slurm/site.env", f'POST_DIST_VENV="{tmp_path}/venv"\nsite_setup() {{ :; }}\n'),
        ("venv/bin/post-dist", '#!/bin/bash\necho "$@ from $MASTER_ADDR"\n'),
    ):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text(text)
        (tmp_path / place).chmod(0o755)
    file = Path(__file__).parents[2] / "slurm/distill.sbatch"
    options = ("--wait", "--export=NONE", f"--chdir={tmp_path}", f"--output={tmp_path / 'log'}")
    done = slurm.run("sbatch", *options, file, "RUN.yaml")
    output = (tmp_path / "log").read_text()
    assert done.returncode == 0, output
    assert re.fullmatch(r"distill RUN.yaml from \w+\n", output)


@pytest.mark.timeout(900)
def test_a_stage_that_fails_cancels_what_waits_for_it(slurm: Cluster, tmp_path: Path) -> None:
    done = submit(
        slurm, write_run(tmp_path, corpus={"held_out_sequences": 10_000}), "pipeline", "--wait"
    )
    assert done.returncode == 3
    assert re.search(r"corpus \(job \d+\) ended as FAILED, exit code 2:0", done.stderr), done.stderr
    assert re.findall(r"(\w+) \(job \d+\): CANCELLED", done.stderr) == [
        "distill",
        "tune",
        "transfer",
        "evaluate",
    ]
    assert "to be held out" in logs(tmp_path)


@pytest.mark.timeout(900)
def test_a_step_is_measured_on_several_numbers_of_nodes(
    slurm: Cluster, tmp_path: Path, main: Callable
) -> None:
    run = write_run(tmp_path, cluster={"distill": {"tasks_per_node": 1, "time_minutes": 10}})
    done = bench(slurm, "scale", run, "--submit=1,2", "--json")
    assert done.returncode == 0, done.stderr
    jobs = json.loads(done.stdout)["jobs"]
    files = [Path(job["result"]) for job in jobs]
    assert in_time(lambda: all(file.exists() for file in files), 200), logs(tmp_path)
    found = [json.loads(file.read_text()) for file in files]
    assert [(each["ranks"], each["hosts"]) for each in found] == [(1, 1), (2, 2)]
    code, out, err = main("report", *files, "--json")
    assert code == 0, err
    assert [(row["scaling"], row["gpus"]) for row in json.loads(out)["scaling"]] == [
        (kind, gpus) for kind in ("strong", "weak") for gpus in (1, 2)
    ]


LONG = {"distill": {"steps": 800, "checkpoint_every_steps": 20}}


@pytest.mark.timeout(900)
def test_a_time_limit_in_the_middle_does_not_end_the_run(slurm: Cluster, tmp_path: Path) -> None:
    run = write_run(
        tmp_path,
        **LONG,
        cluster={"distill": {"nodes": 2, "time_minutes": 20}, "signal_seconds": 20},
    )
    with followed(slurm, run, "distill") as (waiting, job):
        # The limit falls after the first checkpoint, however long this machine takes to start.
        assert in_time(lambda: len(steps_of(tmp_path, "distill")) > 25, 240), logs(tmp_path)
        let_the_time_run_out(slurm, job, tmp_path)
        output = waiting.communicate(timeout=450)[1]
    assert waiting.returncode == 0, output + logs(tmp_path)
    assert "resuming from step" in logs(tmp_path)
    assert "PENDING" in output.partition("RUNNING")[2], "it was queued again"
    assert steps_of(tmp_path, "distill") == list(range(LONG["distill"]["steps"]))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_that_crashes_is_waited_for(slurm: Cluster, chained: tuple[Path, str]) -> None:
    folder = chained[0]
    with followed(slurm, folder / "run.yaml", "transfer", "--set", "transfer.steps=250") as (
        waiting,
        job,
    ):
        assert in_time(lambda: len(steps_of(folder, "transfer")) > 30, 90), logs(folder)
        victim = node_of(slurm, job)
        slurm.kill_node(victim)
        assert in_time(lambda: "NODE_FAIL" in slurm.accounted_states(job), 60), (
            slurm.accounted_states(job)
        )
        assert waiting.poll() is None, "a dead node is no end"
        slurm.start_node(victim)
        output = waiting.communicate(timeout=270)[1]
    assert waiting.returncode == 0, output + logs(folder)
    assert output.count("COMPLETED") == 1
    assert "resuming from step" in logs(folder)
    assert slurm.accounted_states(job)[0] == "NODE_FAIL"


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text file, and its shards as one process that nobody disturbs makes them."""
    folder = tmp_path_factory.mktemp("corpus")
    write_long_corpus(folder / "long.txt", 300)
    run = write_run(folder, corpus={"path": str(folder / "long.txt")})
    command = [sys.executable, "-m", "post_dist", "corpus", str(run)]
    subprocess.run(command, capture_output=True, timeout=900, check=True)
    return folder / "long.txt", shards_of(folder)


def shards_of(folder: Path) -> Path:
    (found,) = (path.parent for path in folder.glob("runs/corpora/*/index.json"))
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("disturbance", ["time limit", "node"])
def test_a_corpus_job_that_is_stopped_ends_with_the_same_shards(
    slurm: Cluster, long_corpus: tuple[Path, Path], tmp_path: Path, disturbance: str
) -> None:
    text, wanted = long_corpus
    run = write_run(
        tmp_path,
        corpus={"path": str(text)},
        cluster={"corpus": {"cpus_per_task": 1, "time_minutes": 10}, "signal_seconds": 20},
    )
    with followed(slurm, run, "corpus") as (waiting, job):
        finished = "runs/corpora/*/*.json"
        assert in_time(lambda: list(tmp_path.glob(finished)), 240), logs(tmp_path)
        if disturbance == "node":
            node = node_of(slurm, job)
            slurm.kill_node(node)
            assert in_time(lambda: "NODE_FAIL" in slurm.accounted_states(job), 60)
            slurm.start_node(node)
        else:
            let_the_time_run_out(slurm, job, tmp_path)
        output = waiting.communicate(timeout=600)[1]
    assert waiting.returncode == 0, output + logs(tmp_path)
    assert output.count("COMPLETED") == 1
    assert "PENDING" in output.partition("RUNNING")[2], "it was queued again"
    made = shards_of(tmp_path)
    names = {path.name for path in wanted.iterdir()}
    assert {path.name for path in made.iterdir()} == names
    for name in names - {"lock"}:
        assert (made / name).read_bytes() == (wanted / name).read_bytes(), name


def lose_a_rank(slurm: Cluster, run: Path, number: int) -> dict:
    """Send a signal to a rank in the middle of a run; return the record of the failure."""
    folder = run.parent
    with followed(slurm, run, "distill") as (waiting, job):
        assert in_time(lambda: len(steps_of(folder, "distill")) > 25, 240), logs(folder)
        (victim,) = processes_of(slurm, job, 1)
        os.kill(victim, number)
        output = waiting.communicate(timeout=500)[1]
    assert waiting.returncode == 0, output + logs(folder)
    assert output.count("COMPLETED") == 1
    assert "resuming from step" in logs(folder)
    (failure,) = (folder / f"runs/tiny/slurm/{job}_failures.jsonl").read_text().splitlines()
    return json.loads(failure)


SURVIVES = {
    "distill": {"steps": 200, "checkpoint_every_steps": 20},
    "cluster": {"distill": {"nodes": 2, "time_minutes": 20}},
}


@pytest.mark.timeout(900)
def test_a_rank_that_dies_does_not_end_the_run(slurm: Cluster, tmp_path: Path) -> None:
    failure = lose_a_rank(slurm, write_run(tmp_path, **SURVIVES), signal.SIGKILL)
    assert failure["exit_code"] not in (0, 6)
    assert failure["step"] > 25


@pytest.mark.timeout(1800)
def test_a_worker_that_dies_does_not_end_the_chain(slurm: Cluster, tmp_path: Path) -> None:
    """Two workers write signals and `distill` trains beside them. One worker is killed."""
    run = write_run(
        tmp_path,
        corpus={"sequence_length": 8},
        distill={"batch_size": 256, "cache": "hidden"},
        engine={"precision": "bf16"},
        cluster={
            "distill": {"time_minutes": 10},
            "signals": {"workers": 2, "time_minutes": 10},
        },
    )
    tiny.write_csv(tmp_path / "public.csv", tiny.sentences(1200, 2))
    with followed(slurm, run, "distill") as (waiting, _):
        signals = "runs/tiny/teacher-signals-*/*/[0-9]*.safetensors"
        assert in_time(lambda: list(tmp_path.glob(signals)), 600), logs(tmp_path)
        listed = slurm.run("squeue", "--noheader", "--name=post_dist-signals", "--format=%A")
        workers = [pid for job in listed.stdout.split() for pid in processes_of(slurm, job, 0)]
        os.kill(workers[0], signal.SIGKILL)
        output = waiting.communicate(timeout=900)[1]
    assert waiting.returncode == 0, output + logs(tmp_path)
    ends = re.findall(r"(\w+) \(job (?:\d+_)?\w+\): COMPLETED", output)
    assert ends == ["corpus", "signals", "signals", "distill"]
    (record,) = tmp_path.glob("runs/tiny/slurm/*_[01]_failures.jsonl")
    assert json.loads(record.read_text())["step"] > 0
    assert len(list(tmp_path.glob(signals))) == 24

    # The teacher in the process gives the same student.
    alone = [f"--output={tmp_path / 'alone/runs'}", "--set=distill.cache=none"]
    command = [sys.executable, "-m", "post_dist", "distill", str(run), *alone]
    options = {"env": environment(slurm), "capture_output": True, "text": True, "check": False}
    done = subprocess.run([*command, "--set=cluster.signals.workers=0"], **options)
    assert done.returncode == 0, done.stderr
    found, wanted = (artifact(folder, "distill") for folder in (tmp_path, tmp_path / "alone"))
    name = "model.safetensors"
    assert (found / name).read_bytes() == (wanted / name).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_rank_that_hangs_does_not_end_the_run(slurm: Cluster, tmp_path: Path) -> None:
    engine = {"hang_timeout_seconds": 90}
    run = write_run(tmp_path / "hung", **SURVIVES, engine=engine)
    failure = lose_a_rank(slurm, run, signal.SIGSTOP)
    assert (failure["exit_code"], "no progress" in failure["reason"]) == (3, True)
    undisturbed = write_run(tmp_path / "undisturbed", **SURVIVES, engine=engine)
    done = submit(slurm, undisturbed, "distill", "--wait")
    assert done.returncode == 0, done.stderr
    found, wanted = (artifact(each.parent, "distill") for each in (run, undisturbed))
    name = "model.safetensors"
    assert (found / name).read_bytes() == (wanted / name).read_bytes()


@pytest.mark.timeout(400)
def test_a_job_that_its_user_cancels_is_not_queued_again(slurm: Cluster, tmp_path: Path) -> None:
    run = write_run(tmp_path, distill={"steps": 100_000}, cluster={"distill": {"nodes": 2}})
    with followed(slurm, run, "distill") as (waiting, job):
        assert in_time(lambda: len(steps_of(tmp_path, "distill")) > 3, 90), logs(tmp_path)
        slurm.run("scancel", job)
        output = waiting.communicate(timeout=150)[1]
    assert waiting.returncode == 3
    assert re.search(r"distill \(job \d+\) ended as CANCELLED", output), output
    assert "stopped by SIGTERM" in logs(tmp_path), "it saved first"
    assert slurm.accounted_states(job) == ["CANCELLED by 0"]
