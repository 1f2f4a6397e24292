"""The batch files, without a Slurm."""

import errno
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import get_args
from unittest import mock

import pytest
import tiny
import yaml
from pydantic import ValidationError

from post_dist.cluster import follow as follow_module
from post_dist.cluster import restart
from post_dist.cluster.follow import State
from post_dist.cluster.restart import decide
from post_dist.cluster.sbatch import SRUN, job_parameters, job_text, task_python
from post_dist.config.cluster import Cluster, ClusterStage
from post_dist.errors import EnvironmentFault

FOLDER = Path(__file__).parents[2] / "slurm"
ONLY_BY_SUBMITIT = ("# command", "export SUBMITIT_EXECUTOR=slurm", "export POST_DIST_", "srun ")
COMMANDS = {
    "corpus": "corpus",
    "signals": "signals",
    "distill": "distill",
    "warm_start": "warm-start",
    "tune": "tune",
    "transfer": "transfer",
    "evaluate": "pipeline",
}


@pytest.mark.parametrize("stage", get_args(ClusterStage))
def test_a_file_in_slurm_has_the_lines_of_a_submitted_job(stage: ClusterStage) -> None:
    text = (FOLDER / f"{stage}.sbatch").read_text()
    parameters = job_parameters(Cluster(), stage, FOLDER)
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
        stage: job_text(
            "x", "/logs", job_parameters(cluster, stage, FOLDER, "afterok:7")
        ).splitlines()
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
    corpus = job_text("x", "/logs", job_parameters(cluster, "corpus", FOLDER))
    assert "--ntasks-per-node=1\n" in corpus
    assert "gpus" not in corpus
    assert {
        "#SBATCH --dependency=afterok:7",
        "#SBATCH --kill-on-invalid-dep=yes",
        "#SBATCH --account=lab",
    } <= set(lines["tune"])


ARRAY = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.mark.parametrize(
    ("code", "cancelled", "array", "requeued"),
    [
        (6, False, {}, "17"),
        (6, True, {}, ""),
        (0, False, {}, ""),
        (2, False, {}, ""),
        (137, False, {}, "17"),
        (137, True, {}, ""),
        (137, False, ARRAY, "17_3"),
    ],
)
def test_a_run_that_saved_or_lost_a_rank_is_queued_again(
    tmp_path: Path, code: int, cancelled: bool, array: dict[str, str], requeued: str
) -> None:
    srun = f"{'kill -TERM $PPID' if cancelled else ':'}\nexit {code}"
    asked = f"requeue {requeued}\n" if requeued else ""
    assert requeued_by(tmp_path, Cluster(), srun, **array) == (code, asked)


def requeued_by(folder: Path, cluster: Cluster, srun: str, **variables: str) -> tuple[int, str]:
    """Run the script of a job whose srun does this; return its exit code and what it asks for."""
    asked = folder / "asked"
    (folder / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {asked}\n')
    (folder / "srun").write_text(f"#!/bin/bash\n{srun}\n")
    for program in ("scontrol", "srun"):
        (folder / program).chmod(0o755)
    text = job_text("work", str(folder), job_parameters(cluster, "distill", folder))
    environment = {
        "PATH": f"{folder}:/usr/bin:/bin",
        "PYTHONPATH": str(FOLDER.parent),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NAME": "post_dist-distill",
    }
    ended = subprocess.run(["bash", "-c", text], env=environment | variables, check=False)
    return ended.returncode, asked.read_text() if asked.exists() else ""


SCHEDULER = {
    "gpus_per_node": 2,
    "gres": "gpu:h100:2",
    "exclusive": True,
    "reservation": "night shift",
    "exclude": "n[3,7]",
    "mpi": "pmix",
    "sbatch": {"comment": "it's $HOME; `id`", "nice": 100, "hold": False, "spread-job": True},
    "srun": ["--cpu-bind=cores"],
    "environment": {"NCCL_SOCKET_IFNAME": "ib0", "A": "x; touch $HOME"},
    "container": {"runtime": "pyxis", "image": "lab#img:1", "mounts": ["/data", "/a b:/b"]},
}


def test_options_of_the_scheduler_are_quoted_values(tmp_path: Path) -> None:
    cluster = Cluster.model_validate(SCHEDULER)
    text = job_text("work", str(tmp_path), job_parameters(cluster, "distill", tmp_path))
    lines = text.splitlines()
    assert {
        "#SBATCH --gres=gpu:h100:2",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --exclusive",
        "#SBATCH --reservation='night shift'",
        "#SBATCH --exclude='n[3,7]'",
        "#SBATCH --nice=100",
        "#SBATCH --spread-job",
        "export NCCL_SOCKET_IFNAME=ib0",
        "export A='x; touch $HOME'",
    } <= set(lines)
    assert "gpus-per-node" not in text
    assert "hold" not in text
    (comment,) = [line for line in lines if "--comment=" in line]
    assert shlex.split(comment.removeprefix("#SBATCH ")) == ["--comment=it's $HOME; `id`"]
    (srun,) = [line for line in lines if line.startswith("srun ")]
    assert shlex.split(srun)[-5:] == [
        "--mpi=pmix",
        "--container-image=lab#img:1",
        "--container-mounts=/data:/data,/a b:/b",
        "--cpu-bind=cores",
        "work",
    ]
    assert task_python(cluster.for_stage("distill")) == "python"
    assert "gres" not in job_text("", ".", job_parameters(cluster, "corpus", tmp_path))

    inside = {"runtime": "apptainer", "image": "/my images/a.sif", "mounts": ["/data"]}
    apptainer = Cluster.model_validate({"gpus_per_node": 1, "container": inside})
    assert shlex.split(task_python(apptainer.for_stage("distill"))) == [
        *("apptainer", "exec", "--nv", "--bind", "/data", "/my images/a.sif", "python")
    ]


@pytest.mark.parametrize(
    ("common", "of_tune"),
    [
        ("gpu:h100:8", "gpu:h100:1"),
        ("gpu:8,nvme:2", "gpu:1,nvme:2"),
        ("gpu:h100", "gpu:h100"),
        ("gpu", "gpu"),
    ],
)
def test_tuning_holds_one_gpu_of_a_node(common: str, of_tune: str) -> None:
    cluster = Cluster.model_validate({"gpus_per_node": 8, "nodes": 4, "gres": common})
    assert cluster.for_stage("tune").gres == of_tune
    assert cluster.for_stage("distill").gres == common
    own = Cluster.model_validate({"gres": common, "tune": {"gres": "gpu:a100:2"}})
    assert own.for_stage("tune").gres == "gpu:a100:2"


def fail(
    folder: Path, code: int, step: int, message: str = "", stage: str = "distill"
) -> tuple[bool, str]:
    """Decide about a failure of a job, whose distillation has done so many steps."""
    run = folder / "distill-01234567"
    run.mkdir(exist_ok=True)
    (run / "resolved.yaml").write_text("distill: {steps: 100}")
    (run / "environment.json").write_text('{"slurm_job": "17"}')
    lines = [json.dumps({"step": each, "seconds": each}) + "\n" for each in range(step)]
    (run / "metrics.jsonl").write_text("".join(lines))
    logs = folder / "slurm"
    logs.mkdir(exist_ok=True)
    with (logs / "17_0_log.out").open("a") as log:
        log.write(f"{message}\n")
    variables = {"POST_DIST_JOB_FOLDER": str(logs), "POST_DIST_MAX_RESTARTS": "3"}
    slurm = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": f"post_dist-{stage}"}
    again, told = decide(code, variables | slurm)
    with (logs / "17_0_log.out").open("a") as log:
        log.write(f"post-dist: {told}\n")
    return again, told


def test_restarts_are_bounded_and_an_equal_failure_is_the_last(tmp_path: Path) -> None:
    message = "post-dist: rank 0 has made no progress for 5 s in: distill"
    assert fail(tmp_path, 3, 17, message) == (
        True,
        "restart 1 of 3: exit code 3 at step 17 (rank 0 has made no progress for 5 s in: distill)",
    )
    # Another failure at the same step, then the same failure at another step.
    assert fail(tmp_path, 137, 17) == (True, "restart 2 of 3: exit code 137 at step 17")
    assert fail(tmp_path, 137, 40)[0]
    again, told = fail(tmp_path, 137, 40)
    assert (again, told) == (
        False,
        "not restarted: exit code 137 at step 40, for the second time at the same step",
    )
    assert fail(tmp_path, 137, 60)[1] == "not restarted: exit code 137 at step 60, after 3 restarts"
    assert len((tmp_path / "slurm" / "17_failures.jsonl").read_text().splitlines()) == 5
    for code in (0, 2, 4, 5):
        assert fail(tmp_path, code, 70) == (False, "")

    # A worker of an array has restarts of its own. Files by any worker are progress.
    place = {"POST_DIST_JOB_FOLDER": str(tmp_path / "slurm"), "SLURM_JOB_ID": "19"}
    worker = {"SLURM_ARRAY_JOB_ID": "18", "SLURM_ARRAY_TASK_ID": "1"}
    worker |= place | {"SLURM_JOB_NAME": "post_dist-signals"}
    assert decide(137, worker) == (True, "restart 1 of 10: exit code 137 at step 0")
    file = tmp_path / "teacher-signals-1/000000/000000000.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    assert decide(137, worker) == (True, "restart 2 of 10: exit code 137 at step 1")
    # With a limit of the cache, the student says how many files it has read.
    (tmp_path / "teacher-signals-1/first").write_text("7")
    assert decide(137, worker) == (True, "restart 3 of 10: exit code 137 at step 8")
    (tmp_path / "teacher-signals-1/first").write_text("\0\0")
    assert decide(137, worker) == (True, "restart 4 of 10: exit code 137 at step 1")
    (tmp_path / "teacher-signals-1/first").write_text("7")
    assert decide(137, worker) == (True, "restart 5 of 10: exit code 137 at step 8")
    assert not decide(137, worker)[0]
    assert (tmp_path / "slurm" / "18_1_failures.jsonl").exists()

    # A stage without steps never comes further.
    (tmp_path / "other").mkdir()
    assert fail(tmp_path / "other", 1, 10, stage="evaluate")[0]
    assert not fail(tmp_path / "other", 1, 20, stage="evaluate")[0]


def test_time_limits_without_progress_end_a_job(tmp_path: Path) -> None:
    for step in (5, 9, 9):
        assert fail(tmp_path, 6, step) == (True, "")
    # A failure in between is another end. It counts alone.
    assert fail(tmp_path, 137, 9) == (True, "restart 1 of 3: exit code 137 at step 9")
    for _ in range(2):
        assert fail(tmp_path, 6, 9) == (True, "")
    assert fail(tmp_path, 6, 9) == (
        False,
        "not restarted: the time limit has come 3 times at step 9; raise time_minutes",
    )


def test_the_step_is_that_of_the_job_s_own_run(tmp_path: Path) -> None:
    # A run with other settings, by another job, is newer and finished.
    other = tmp_path / "distill-fedcba98"
    other.mkdir()
    (other / "resolved.yaml").write_text("distill: {steps: 9}")
    (other / "environment.json").write_text('{"slurm_job": "18"}')
    assert fail(tmp_path, 137, 100) == (True, "restart 1 of 3: exit code 137 at step 100")
    assert fail(tmp_path, 137, 500) == (True, "restart 2 of 3: exit code 137 at step 500")


def test_a_record_that_a_full_disk_has_cut_is_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fail(tmp_path, 137, 10)[0]
    record = tmp_path / "slurm" / "17_failures.jsonl"
    with record.open("a") as file:
        file.write('{"time": "x", "exit_code": 1, "step": [], "reason": 7}\n')
        file.write("[" * 100_000 + "\n")
        file.write('{"time": 1')
    assert fail(tmp_path, 137, 20) == (True, "restart 2 of 3: exit code 137 at step 20")
    assert not fail(tmp_path, 137, 20)[0]
    assert len(record.read_text().splitlines()) == 6
    # Without a record, nobody would count the restarts.
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    monkeypatch.setattr(restart, "append_line", full)
    again, told = fail(tmp_path, 137, 30)
    assert not again
    assert "cannot be written: No space left on device" in told
    assert fail(tmp_path, 6, 30)[0]


@pytest.mark.parametrize("setup", ["set -euo pipefail", "set -e; false || true"])
def test_what_setup_says_to_the_shell_ends_with_it(tmp_path: Path, setup: str) -> None:
    cluster = Cluster.model_validate({"setup": [setup]})
    assert requeued_by(tmp_path, cluster, "exit 6") == (6, "requeue 17\n")


def test_a_job_that_has_saved_goes_on_if_python_is_gone(tmp_path: Path) -> None:
    broken = Cluster.model_validate({"setup": ["POST_DIST_PYTHON=/nowhere/python"]})
    assert requeued_by(tmp_path, broken, "exit 6") == (6, "requeue 17\n")
    (tmp_path / "asked").unlink()
    assert requeued_by(tmp_path, broken, "exit 137") == (137, "")


def test_an_own_option_against_restarts_stays_the_only_one(tmp_path: Path) -> None:
    cluster = Cluster.model_validate({"sbatch": {"no-requeue": True}})
    text = job_text("work", str(tmp_path), job_parameters(cluster, "distill", tmp_path))
    assert "#SBATCH --no-requeue" in text
    assert "#SBATCH --requeue" not in text


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
        ({"reservation": "a\n#SBATCH --uid=0"}, "cluster.reservation: must be one line"),
        ({"environment": {"A": "a\nid"}}, "cluster.environment.A: must be one line"),
        ({"environment": {"A=1;id": "a"}}, "cluster.environment.A=1;id"),
        ({"sbatch": {"comment": "a\nid"}}, "must be one line"),
        ({"sbatch": {"time": "9"}}, "time is set by post_dist"),
        ({"sbatch": {"parsable": True}}, "parsable changes what sbatch answers"),
        ({"distill": {"sbatch": {"quiet": True}}}, "quiet changes what sbatch answers"),
        ({"sbatch": {"test": True}}, "test is short for test-only"),
        ({"sbatch": {"outp": "log"}}, "outp is short for output"),
        ({"srun": ["id"]}, "cluster.srun.0: must be a long option"),
        (
            {"container": {"runtime": "pyxis", "image": "a", "mounts": ["data"]}},
            "cluster.container.mounts.0",
        ),
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


def test_workers_are_an_array_and_distill_starts_beside_them(
    tmp_path: Path, main: Callable
) -> None:
    asked = {"signals": {"workers": 3, "nodes": 2}, "tasks_per_node": 4}
    run = write_run(tmp_path, distill={"cache": "hidden"}, cluster=asked)
    for command, last in (("distill", "distill"), ("pipeline", "evaluate")):
        code, text, error = main("submit", run, command, "--print", "--json")
        assert code == 0, error
        files = {job["stage"]: job["batch_file"] for job in json.loads(text)["jobs"]}
        assert [*files][:3] == ["corpus", "signals", "distill"]
        assert [*files][-1] == last
        lines = {stage: set(file.splitlines()) for stage, file in files.items()}
        assert {
            "#SBATCH --array=0-2%3",
            "#SBATCH --nodes=2",
            "#SBATCH --ntasks-per-node=4",
            "#SBATCH --dependency='afterok:<corpus>'",
        } <= lines["signals"]
        assert "%A_%a_%t_log.out" in files["signals"]
        # A worker that fails does not cancel what can be done without it.
        assert "#SBATCH --dependency='after:<signals>,afterok:<corpus>'" in lines["distill"]
        assert "--array" not in files["distill"]
    assert "#SBATCH --dependency='afterok:<distill>'" in lines["tune"]
    code, text, _ = main("submit", run, "signals", "--print")
    assert (code, text.count("#SBATCH --array=0-2%3")) == (0, 1)
    code, _, error = main("submit", run, "distill", "--print", "--set=distill.cache=none")
    assert (code, "cluster.signals.workers is for a run" in error) == (2, True)


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
    ("answer", "stage", "message"),
    [
        ("echo 101", "transfer", "the number of the job for transfer is unknown"),
        ("true", "distill", "the number of the job for distill is unknown"),
        ("echo Socket timed out >&2; exit 1", "tune", "Slurm does not take the job for tune"),
    ],
)
def test_a_job_that_may_be_queued_is_not_said_to_be_gone(
    tmp_path: Path, main: Callable, commands: Callable, answer: str, stage: str, message: str
) -> None:
    commands(
        sbatch=f"[[ $1 == --test-only ]] && exit\n"
        f'grep -q "job-name=post_dist-{stage}" "${{@: -1}}" && {{ {answer}; exit; }}\n'
        "echo Submitted batch job 41",
        srun="",
        scancel="",
    )
    code, out, error = main("submit", write_run(tmp_path), "pipeline")
    assert (code, out) == (3, "")
    assert message in error
    assert f"may be in the queue: see `squeue --me --name=post_dist-{stage}`" in error
    assert "the jobs before it are cancelled: 41" in error
    assert "nothing is left" not in error


def test_the_array_s_number_is_what_the_next_job_waits_for(
    tmp_path: Path, main: Callable, commands: Callable
) -> None:
    log = tmp_path / "log"
    answers = (
        "[[ $1 == --test-only ]] && exit",
        f'grep --only-matching -- "dependency=.*" "${{@: -1}}" >> {log}',
        f"echo Submitted batch job 4$(grep --count dependency {log})",
    )
    commands(sbatch="\n".join(answers), srun="")
    run = write_run(tmp_path, distill={"cache": "hidden"}, cluster={"signals": {"workers": 2}})
    code, out, error = main("submit", run, "distill", "--json")
    assert code == 0, error
    assert [(job["stage"], job["job_id"]) for job in json.loads(out)["jobs"]] == [
        *(("corpus", "40"), ("signals", "41_0"), ("signals", "41_1"), ("distill", "42"))
    ]
    assert log.read_text().splitlines() == [
        "dependency=afterok:40",
        "dependency=after:41,afterok:40",
    ]


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


def test_only_submit_itself_advises_its_option_local(
    tmp_path: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = write_run(tmp_path)
    advice = "sbatch is not here\n  submit from a login node of the cluster"
    code, _, error = main("submit", run, "distill")
    assert code == 3
    assert f"{advice}, or use --local" in error
    for arguments in (("submit", run, "distill", "--test-only"), ("bench", "scale", run)):
        options = ("--submit", "1") if arguments[0] == "bench" else ()
        code, _, error = main(*arguments, *options)
        assert code == 3
        assert advice in error
        assert "--local" not in error


def test_json_is_one_object_whatever_is_asked(
    tmp_path: Path, main: Callable, commands: Callable
) -> None:
    commands(sbatch="echo sbatch: Job 1 to start at noon >&2")
    run = tiny.write_run(tmp_path)
    text = main("submit", run, "distill", "--print")[1]
    assert json.loads(main("submit", run, "distill", "--print", "--json")[1]) == {
        "jobs": [{"stage": "distill", "batch_file": text[:-1]}]
    }
    assert main("submit", run, "distill", "--test-only")[1] == "distill: Job 1 to start at noon\n"
    answers = json.loads(main("submit", run, "distill", "--test-only", "--json")[1])
    assert answers == {"jobs": [{"stage": "distill", "answer": "Job 1 to start at noon"}]}
    # Slurm cannot know that the corpus is missing, and `check` can.
    (tmp_path / "public.csv").unlink()
    (tmp_path / "private.csv").unlink()
    code, out, error = main("submit", run, "distill", "--test-only")
    assert (code, out) == (2, "")
    assert "distill: " in error
    assert str(tmp_path / "public.csv") in error
    assert "private.csv" not in error, "another stage's file"


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


@pytest.mark.parametrize("name", ["a%j", "50%", "a\\b"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_pattern_in_the_path_of_the_logs_is_refused(
    tmp_path: Path, main: Callable, monkeypatch: pytest.MonkeyPatch, name: str, whole: bool
) -> None:
    (tmp_path / name).mkdir()
    run = write_run(tmp_path, output="runs")
    place: tuple[object, ...] = ("--output", tmp_path / name)
    if not whole:
        # submitit makes the path absolute.
        monkeypatch.chdir(tmp_path / name)
        place = ("--output", "runs")
    for how in ("--print", "--test-only", "--local"):
        code, out, error = main("submit", run, "distill", how, *place)
        assert (code, out) == (2, "")
        assert "which Slurm reads as a pattern in the path of a log" in error
    assert list((tmp_path / name).iterdir()) == []


@pytest.mark.parametrize(
    ("written", "minutes"),
    [
        ("90", 90),
        ("90:30", 91),
        ("24:00:00", 1440),
        ("1-12", 2160),
        ("1-12:30", 2190),
        ("2-00:00:01", 2881),
    ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(written: str, minutes: int) -> None:
    assert Cluster(time_minutes=written).time_minutes == minutes
    assert Cluster(distill={"time_minutes": written}).for_stage("distill").time_minutes == minutes


@pytest.mark.parametrize("written", ["", "1h", "1-2-3", "1:2:3:4", "-5", "0", "1-"])
def test_another_time_limit_is_refused(written: str) -> None:
    with pytest.raises(ValidationError):
        Cluster(time_minutes=written)


def test_doctor_names_a_lock_that_a_killed_compiler_left(
    tmp_path: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ops"))
    code, text, _ = main("doctor", tmp_path / "runs", "--json")
    assert {check["name"] for check in json.loads(text)["checks"]} >= {
        "python",
        "memory",
        "torch",
        "CUDA",
        "hub",
        "hub token",
        "containers",
        "deepspeed",
        "ops",
        "Slurm",
        "space",
        "clock",
    }
    assert not (tmp_path / "runs").exists()
    # Slurm may be installed without a configuration, and then names no version.
    assert all(check["found"] for check in json.loads(text)["checks"])
    before = {check["name"]: check["ok"] for check in json.loads(text)["checks"]}
    assert before["ops"]
    lock = tmp_path / "ops" / "async_io" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    code, text, _ = main("doctor", tmp_path / "runs")
    assert code == 3
    assert f"BAD  ops: a killed compiler left {lock}; remove the file" in text


def test_a_job_that_slurm_has_forgotten_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter(
        [State("RUNNING", queued=True)] + [State("")] * 59 + [State("PENDING", queued=True)]
    )
    looked = []

    def look(job: str) -> State:
        looked.append(next(states, State("")))
        return looked[-1]

    monkeypatch.setattr(follow_module, "_state", look)
    monkeypatch.setattr(follow_module, "_POLL_SECONDS", 0.0)
    job = SimpleNamespace(stage="distill", job_id="17", log="the/log")
    with pytest.raises(EnvironmentFault, match=r"ended as UNKNOWN(.|\n)*the/log"):
        follow_module.follow([job], lambda line: None)
    # Slurm may lose sight of a job for a while.
    assert len(looked) == 61 + 60


def test_doctor_names_a_folder_that_cannot_be_there(tmp_path: Path, main: Callable) -> None:
    code, text, _ = main("doctor", tmp_path / ("a" * 300) / "b")
    assert code == 3
    assert "File name too long" in text
