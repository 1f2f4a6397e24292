"""The batch files, without a Slurm."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import yaml

from post_dist.cluster.sbatch import SRUN, job_parameters, job_text
from post_dist.config.cluster import Cluster, ClusterStage

FOLDER = Path(__file__).parents[2] / "slurm"
ONLY_BY_SUBMITIT = ("# command", "export SUBMITIT_EXECUTOR=slurm", "srun ")
COMMANDS = {
    "corpus": "corpus",
    "distill": "distill",
    "warm_start": "warm-start",
    "tune": "tune",
    "transfer": "transfer",
    "evaluate": "pipeline",
}


@pytest.mark.parametrize("stage", get_args(ClusterStage))
def test_a_file_in_slurm_has_the_lines_of_a_submitted_job(stage: ClusterStage) -> None:
    text = (FOLDER / f"{stage}.sbatch").read_text()
    parameters = job_parameters(Cluster(), stage)
    parameters["additional_parameters"]["output"] = f"post_dist-{stage}-%j.log"
    wanted = [
        line
        for line in job_text("", ".", parameters).splitlines()
        if line.strip() and not line.startswith(ONLY_BY_SUBMITIT)
    ]
    assert set(wanted) <= set(text.splitlines())
    header = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert set(header) <= set(wanted), "nothing is asked for that a submitted job does not ask for"
    (srun,) = re.findall(r"^srun .*", text, re.MULTILINE)
    assert set(SRUN) < set(srun.split())
    assert '--cpus-per-task="$SLURM_CPUS_PER_TASK"' in srun, "sbatch's own option wins"
    assert f"exec post-dist {COMMANDS[stage]} " in text


def test_a_stage_asks_for_its_own_resources_and_else_for_the_cluster_s() -> None:
    distill, tune = {"nodes": 4, "time_minutes": 600}, {"partition": "one"}
    cluster = Cluster(
        partition="gpu", account="lab", gpus_per_node=8, cpus_per_task=4, distill=distill, tune=tune
    )
    lines = {
        stage: job_text("x", "/logs", job_parameters(cluster, stage, "7")).splitlines()
        for stage in ("distill", "tune")
    }
    assert {
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --time=600",
        "#SBATCH --partition=gpu",
    } <= set(lines["distill"])
    assert {
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --partition=one",
    } <= set(lines["tune"])
    assert [
        next(line for line in lines[stage] if line.startswith("srun ")).count("--cpus-per-task=4 ")
        for stage in lines
    ] == [1, 1]
    corpus = job_text("x", "/logs", job_parameters(cluster, "corpus"))
    assert "--ntasks-per-node=1\n" in corpus
    assert "gpus" not in corpus
    assert {
        "#SBATCH --dependency=afterok:7",
        "#SBATCH --kill-on-invalid-dep=yes",
        "#SBATCH --account=lab",
    } <= set(lines["tune"])


@pytest.mark.parametrize(
    ("code", "cancelled", "requeued"),
    [(6, False, True), (6, True, False), (0, False, False), (2, False, False)],
)
def test_only_a_run_that_saved_for_lack_of_time_is_queued_again(
    tmp_path: Path, code: int, cancelled: bool, requeued: bool
) -> None:
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "srun").write_text(
        f"#!/bin/bash\n{'kill -TERM $PPID' if cancelled else ':'}\nexit {code}\n"
    )
    for program in ("scontrol", "srun"):
        (tmp_path / program).chmod(0o755)
    text = job_text("work", str(tmp_path), job_parameters(Cluster(), "distill"))
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17"}
    assert subprocess.run(["bash", "-c", text], env=environment, check=False).returncode == code
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 17\n" if requeued else "")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"tune": {"nodes": 2}}, "tune.nodes: tuning runs in one process"),
        ({"tune": {"nodes": "2"}}, "tune.nodes: tuning runs in one process"),
        ({"corpus": {"gpus_per_node": 1}}, "corpus.gpus_per_node: tokenizing runs on one node"),
        ({"tune": {"nodes": "two"}}, "cluster.tune.nodes: input should be a valid integer"),
        ({"distill": {"node": 2}}, "cluster.distill.node: unknown key; did you mean 'nodes'?"),
        (
            {"gpus_per_node": 8, "transfer": {"tasks_per_node": 2}},
            "transfer: tasks_per_node (2) must be gpus_per_node (8)",
        ),
        (
            {"evaluate": {"time_minutes": 2}},
            "evaluate: signal_seconds (120) leaves nothing of time_minutes (2)",
        ),
        ({"memory": "lots"}, "cluster.memory"),
    ],
)
def test_wrong_resources_are_named(
    tmp_path: Path, main: Callable, section: dict, message: str
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"name": "x", "cluster": section}))
    code, _, error = main("submit", tmp_path / "run.yaml", "distill", "--print")
    assert code == 2
    assert message in error


def write_run(folder: Path, *without: str, **sections: dict) -> Path:
    """A run file of a whole pipeline but for some sections; what it names need not be there."""
    words = {"template": "{text} It was", "labels": {"0": ["bad"], "1": ["good"]}}
    fields = {
        "name": "x",
        "teacher": {"path": "./teacher"},
        "student": {"num_layers": 2},
        "corpus": {"path": "corpus.txt"},
        "private_task": {"name": "mine", "visibility": "private", "path": "private.csv"} | words,
        "public_task": {"name": "public", "visibility": "public", "path": "public.csv"},
    } | sections
    run = folder / "run.yaml"
    run.write_text(
        yaml.safe_dump({name: section for name, section in fields.items() if name not in without})
    )
    return run


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"student": "student", "source_prompt": "prompt"}, ["transfer", "evaluate"]),
        ({"target_prompt": "prompt"}, ["corpus", "distill", "tune", "evaluate"]),
    ],
)
def test_what_is_given_in_inputs_needs_no_job(
    tmp_path: Path, main: Callable, given: dict, wanted: list[str]
) -> None:
    code, text, error = main("submit", write_run(tmp_path, inputs=given), "pipeline", "--print")
    assert code == 0, error
    assert [line for line in text.splitlines() if "--job-name" in line] == [
        f"#SBATCH --job-name=post_dist-{stage}" for stage in wanted
    ]


PRIVATE = {
    "enabled": True,
    "target_epsilon": 0.01,
    "target_delta": 1e-6,
    "sampling_probability": 1.0,
    "steps": 10_000,
}


@pytest.mark.parametrize(
    ("command", "without", "sections", "message"),
    [
        (
            "pipeline",
            ("private_task", "public_task"),
            {},
            "the run file lacks the sections private_task, public_task",
        ),
        ("pipeline", ("student",), {}, "lacks the section student"),
        (
            "transfer",
            ("corpus",),
            {"inputs": {"source_prompt": "prompt"}},
            "lacks the section corpus",
        ),
        ("pipeline", (), {"privacy": PRIVATE}, "no noise multiplier up to 200"),
    ],
)
def test_jobs_that_cannot_succeed_are_not_planned(
    tmp_path: Path,
    main: Callable,
    command: str,
    without: tuple[str, ...],
    sections: dict,
    message: str,
) -> None:
    code, text, error = main(
        "submit", write_run(tmp_path, *without, **sections), command, "--print"
    )
    assert (code, text) == (2, "")
    assert message in error


def test_a_stage_needs_no_section_of_one_whose_result_is_given(
    tmp_path: Path, main: Callable
) -> None:
    run = write_run(
        tmp_path,
        "student",
        "corpus",
        "private_task",
        inputs={"student": "student", "source_prompt": "prompt"},
    )
    assert main("submit", run, "transfer", "--print")[0] == 0


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put commands of Slurm, as shell lines, before those that are installed."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(**lines: str) -> None:
        for name, line in lines.items():
            (folder / name).write_text(f"#!/bin/bash\n{line}\n")
            (folder / name).chmod(0o755)

    return write


def test_all_measurements_are_tried_first_and_queued_all_or_none(
    tmp_path: Path, main: Callable, commands: Callable
) -> None:
    log = tmp_path / "log"
    answers = (
        'nodes=$(grep --only-matching -- "--nodes=[0-9]*" "${@: -1}")',
        f'[[ $1 == --test-only ]] && {{ echo "try $nodes" >> {log}; exit; }}',
        f'echo "queue $nodes" >> {log}',
        "[[ $nodes == --nodes=4 ]] && { echo too many >&2; exit 1; }",
        "echo Submitted batch job 4${nodes#--nodes=}",
    )
    commands(sbatch="\n".join(answers), srun="", scancel=f'echo "cancel $@" >> {log}')
    code, out, error = main("bench", "scale", write_run(tmp_path), "--submit", "1,2,4")
    assert (code, out) == (3, "")
    assert "too many\n  the jobs before it are cancelled: 41, 42" in error
    asked = [f"{what} --nodes={nodes}" for what in ("try", "queue") for nodes in (1, 2, 4)]
    assert log.read_text().splitlines() == [*asked, "cancel 41", "cancel 42"]


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("sbatch: fatal: Could not establish a configuration source", 3),
        ("allocation failure: Unable to contact slurm controller (connect failure)", 3),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", 3),
        ("allocation failure: Invalid partition name specified", 2),
    ],
)
def test_a_silent_slurm_is_no_wrong_run_file(
    tmp_path: Path, main: Callable, commands: Callable, message: str, code: int
) -> None:
    commands(sbatch=f"echo '{message}' >&2; exit 1")
    found, out, error = main("submit", write_run(tmp_path), "distill", "--test-only")
    assert (found, out) == (code, "")
    assert message in error
    assert ("see `cluster`" in error) == (code == 2)


def test_json_is_one_object_whatever_is_asked(
    tmp_path: Path, main: Callable, commands: Callable
) -> None:
    commands(sbatch="echo sbatch: Job 1 to start at noon >&2")
    run = write_run(tmp_path)
    text = main("submit", run, "distill", "--print")[1]
    assert json.loads(main("submit", run, "distill", "--print", "--json")[1]) == {
        "jobs": [{"stage": "distill", "batch_file": text[:-1]}]
    }
    assert main("submit", run, "distill", "--test-only")[1] == "distill: Job 1 to start at noon\n"
    answers = json.loads(main("submit", run, "distill", "--test-only", "--json")[1])
    assert answers == {"jobs": [{"stage": "distill", "answer": "Job 1 to start at noon"}]}


def test_logs_that_cannot_be_written_are_named(
    tmp_path: Path, main: Callable, commands: Callable
) -> None:
    (tmp_path / "taken").touch()
    commands(sbatch="echo Submitted batch job 1", srun="")
    code, out, error = main(
        "submit", write_run(tmp_path), "distill", "--output", tmp_path / "taken"
    )
    assert (code, out) == (2, "")
    assert f"cannot write {tmp_path / 'taken/x/slurm'}" in error


def test_doctor_names_a_lock_that_a_killed_compiler_left(
    tmp_path: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ops"))
    code, text, _ = main("doctor", tmp_path / "runs", "--json")
    assert {check["name"] for check in json.loads(text)["checks"]} >= {
        "python",
        "torch",
        "CUDA",
        "deepspeed",
        "ops",
        "Slurm",
        "space",
        "clock",
    }
    assert not (tmp_path / "runs").exists()
    before = {check["name"]: check["ok"] for check in json.loads(text)["checks"]}
    assert before["ops"]
    lock = tmp_path / "ops" / "async_io" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    code, text, _ = main("doctor", tmp_path / "runs")
    assert code == 3
    assert f"BAD  ops: a killed compiler left {lock}; remove the file" in text
