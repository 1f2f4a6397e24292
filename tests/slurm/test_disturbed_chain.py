"""Chains on a real Slurm: each stage is disturbed once, and the results are the same."""

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from subprocess import Popen
from threading import Lock

import pytest
import tiny
import yaml
from cluster import Cluster, in_time
from submissions import (
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

STEPS = 300
SEVERAL = {"nodes": 2, "time_minutes": 10}
ALONE = {"time_minutes": 10}
WORDS = {"template": "Review: {text} It was", "labels": {0: ["bad"], 1: ["good"]}}
CHAIN = {
    "corpus": {"path": "long.txt", "sequence_length": 8},
    "public_task": WORDS,
    "distill": {"steps": STEPS, "batch_size": 32, "cache": "hidden", "checkpoint_every_steps": 20},
    "tune": {"steps": STEPS},
    "transfer": {"steps": STEPS},
    "evaluate": {"baselines": ["full prompt tuning"]},
    "engine": {"precision": "bf16", "hang_timeout_seconds": 120},
    "cluster": {
        "corpus": ALONE,
        "signals": ALONE | {"workers": 1},
        "distill": SEVERAL,
        "warm_start": SEVERAL,
        "tune": ALONE,
        "transfer": SEVERAL,
        "evaluate": SEVERAL,
        "signal_seconds": 20,
    },
}
ALL = ("corpus", "signals", "distill", "warm_start", "tune", "transfer", "evaluate")
MAKE_RESULTS = {"distill", "warm_start", "tune", "transfer", "tune-target", "evaluate"}
OF_TWO_RANKS = ("distill", "warm_start", "transfer", "evaluate")


def write_chain(folder: Path) -> Path:
    run = write_run(folder, **CHAIN)
    fields = yaml.safe_load(run.read_text())
    fields["warm_start"] = {"num_virtual_tokens": 5, "steps": STEPS}
    run.write_text(yaml.safe_dump(fields))
    write_long_corpus(folder / "long.txt", 40)
    tiny.write_csv(folder / "public.csv", tiny.sentences(400, 2))
    return run


def results(folder: Path) -> dict[str, bytes]:
    """The contents of all results of a chain, by stage and name."""
    files = [*folder.glob("runs/*/*/artifact/*.safetensors"), *folder.glob("runs/*/*/*/table.json")]
    found = {f"{path.parts[-3][:-9]}/{path.name}": path.read_bytes() for path in files}
    assert {name.partition("/")[0] for name in found} == MAKE_RESULTS
    return found


def is_under_way(folder: Path, stage: str) -> bool:
    if stage == "corpus":
        return any(folder.glob("runs/corpora/*/*.json"))
    if stage == "signals":
        return any(folder.glob("runs/tiny/teacher-signals-*/*/[0-9]*.safetensors"))
    # Most of the last job's work is a baseline.
    return len(steps_of(folder, "tune-target" if stage == "evaluate" else stage)) > 20


def crash_its_node(slurm: Cluster, job: str, folder: Path) -> None:
    node = node_of(slurm, job)
    slurm.kill_node(node)
    failed = in_time(lambda: "NODE_FAIL" in slurm.accounted_states(job), 90)
    slurm.start_node(node)
    assert failed, logs(folder)


def signal_a_rank(number: int, slurm: Cluster, job: str, folder: Path) -> None:
    """Send a signal to rank 1, or to the only rank."""
    # While rank 0 works alone, nobody but its own watchdog can find out that it is still.
    (rank,) = processes_of(slurm, job, 1) or processes_of(slurm, job, 0)
    os.kill(rank, number)


DISTURBANCES: dict[str, tuple[tuple[str, ...], Callable[[Cluster, str, Path], None]]] = {
    "a rank is killed": (ALL, partial(signal_a_rank, signal.SIGKILL)),
    # Nobody is left to find out that the only process of a job is still.
    "a rank is still": (OF_TWO_RANKS, partial(signal_a_rank, signal.SIGSTOP)),
    "a node crashes": (ALL, crash_its_node),
    "the time is up": (ALL, let_the_time_run_out),
}


@pytest.fixture(scope="module")
def undisturbed(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of a chain that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = submit(slurm, write_chain(folder), "pipeline", "--wait")
    assert done.returncode == 0, done.stderr + logs(folder)
    return results(folder)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_a_chain_that_is_disturbed_in_each_stage_ends_with_the_same_results(
    slurm: Cluster, undisturbed: dict[str, bytes], tmp_path: Path, disturbance: str
) -> None:
    stages, disturb = DISTURBANCES[disturbance]
    one_at_a_time = Lock()  # signals and distill run side by side

    def disturb_once(waiting: Popen, stage: str) -> str:
        in_time(lambda: is_under_way(tmp_path, stage) or waiting.poll() is not None, 1800)
        with one_at_a_time:
            name = f"--name=post_dist-{stage}"
            job = slurm.run("squeue", "--noheader", name, "--states=R", "--format=%A").stdout
            assert job.strip(), f"{stage} does not run: {logs(tmp_path)}"
            disturb(slurm, job.strip(), tmp_path)
        return job.strip()

    with (
        followed(slurm, write_chain(tmp_path), "pipeline") as (waiting, _),
        ThreadPoolExecutor(len(stages)) as pool,
    ):
        disturbed = list(pool.map(partial(disturb_once, waiting), stages))
        output = waiting.communicate(timeout=900)[1]
    assert waiting.returncode == 0, output + logs(tmp_path)
    assert output.count("COMPLETED") == len(ALL)
    for stage, job in zip(stages, disturbed, strict=True):
        assert len(slurm.accounted_states(job)) > 1, f"{stage} was not queued again"
    assert results(tmp_path) == undisturbed
