"""`ls` and `status`: which runs there are, and how far they are."""

import errno
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_run import HOSTILE, write_full_run, write_metrics

from post_dist.artifacts.manifest import FILE_NAME
from post_dist.artifacts.run_folder import MEMBERSHIP, RunFolder
from post_dist.config.schema import RunConfig
from post_dist.config.yaml_files import write_yaml
from post_dist.errors import EnvironmentFault, InputError
from post_dist.files import lock_file
from post_dist.runtime.metric_log import MetricLog, read_metric_log


def write_unfinished(folder: Path, *checkpoints: int, **settings: dict) -> Path:
    """Write the folder of a run that is not finished."""
    folder.mkdir(parents=True)
    (folder / "resolved.yaml").write_text(write_yaml(settings))
    (folder / "environment.json").write_text("{}")
    (folder / "lock").touch()
    for step in checkpoints:
        (folder / f"checkpoints/step-{step}").mkdir(parents=True)
    return folder


def status_of(main: Callable, folder: Path) -> dict:
    code, out, err = main("status", folder, "--json")
    assert code == 0, err
    (stage,) = json.loads(out)["stages"]
    return stage


def test_ls_lists_runs_and_artifacts_with_their_epsilon(tmp_path: Path, main: Callable) -> None:
    write_full_run(tmp_path / "a/demo")
    for name in ("distill-1", "tune-1"):
        (tmp_path / "a/demo" / name / "resolved.yaml").write_text("{}")
    write_unfinished(tmp_path / "a/demo/tune-target-2")
    write_unfinished(tmp_path / "a/.hidden/tune-3")
    code, out, _ = main("ls", tmp_path, "--json")
    assert code == 0
    runs = {Path(run["path"]).relative_to(tmp_path): run for run in json.loads(out)["runs"]}
    found = {str(path): (run["stage"], run["state"], run["epsilon"]) for path, run in runs.items()}
    assert found == {
        "a/demo/distill-1": ("distill", "finished", None),
        "a/demo/warm_start-1/artifact": ("public prompt", "finished", None),
        "a/demo/tune-1": ("tune", "finished", 1.0),
        "a/demo/tune-target-2": ("tune", "unfinished", None),
        "a/demo/transfer-1/artifact": ("soft prompt", "finished", 1.0),
        "a/demo/evaluate-0": ("evaluate", "finished", None),
    }


def test_ls_prints_names_as_text_and_waits_for_no_pipe(tmp_path: Path, main: Callable) -> None:
    name = HOSTILE.replace("/", "")
    write_unfinished(tmp_path / name)
    (tmp_path / "other").mkdir()
    for file in ("post_dist.json", "privacy.json"):
        os.mkfifo(tmp_path / "other" / file)
    code, out, _ = main("ls", tmp_path)
    assert (code, len(out.splitlines())) == (0, 2)
    assert "\x1b" not in out
    assert "unknown artifact" in out


@pytest.mark.parametrize(
    ("settings", "metrics"),
    [
        ("distill: {steps: '\x1b[31m'}", '{"step": 1, "seconds": 1}'),
        ("distill: {steps: 2020-01-01}", "[1]"),
        ("distill: {steps: .inf}", ""),
        (f"distill: {{steps: 0x{'f' * 9000}}}", ""),
        ("distill: [1]", ""),
        ("distill: {steps: 5}", '{"step": 1e400, "seconds": 1}'),
        ("distill: {steps: 5}", '{"step": 1, "seconds": -Infinity}\n{"step": 2, "seconds": 1}'),
        ("distill: {steps: 5}", f'{{"step": {"9" * 400}, "seconds": {"9" * 400}}}'),
        ("distill: {steps: 5}", "[" * 20000),
        ("a: " + "[" * 20000, ""),
        ("a: [x]\n" * 200000, ""),
        ("a: &a [1]\nb: &b [*a, *a]\nc: &c [*b, *b]\ndistill: {steps: *c}", ""),
    ],
)
def test_files_of_others_hold_anything(
    tmp_path: Path, main: Callable, settings: str, metrics: str
) -> None:
    run = write_unfinished(tmp_path / "runs/distill-1a2b3c4d")
    (run / "resolved.yaml").write_text(settings)
    (run / "metrics.jsonl").write_text(metrics)
    private = write_unfinished(tmp_path / "runs/tune-1a2b3c4d", tune=[1], privacy=[1])
    (private / "checkpoints" / f"step-{'9' * 200}").mkdir(parents=True)
    (private / "checkpoints" / "step-1\u0662").mkdir()
    (private / "checkpoints" / "step-9").write_text("")
    os.utime(private / "resolved.yaml", (2**40, 2**40))
    (tmp_path / "runs/other").mkdir()
    (tmp_path / "runs/other/post_dist.json").symlink_to("nowhere")
    os.mkfifo(tmp_path / "runs/resolved.yaml")
    start = time.process_time()
    for command in ("status", "ls"):
        code, out, err = main(command, tmp_path, "--json")
        assert code == 0, err
        assert len(out) < 2000
    # Much less than a minute for whatever a small file holds.
    assert time.process_time() - start < 5


@pytest.mark.parametrize("command", ["ls", "status"])
def test_a_folder_that_is_none_is_named(tmp_path: Path, main: Callable, command: str) -> None:
    code, _, err = main(command, tmp_path / "none")
    assert code == 2
    assert f"{tmp_path / 'none'} is not a folder" in err


def test_status_counts_steps_and_estimates_the_time(tmp_path: Path, main: Callable) -> None:
    run = write_unfinished(tmp_path / "distill-1", 100, distill={"steps": 500})
    write_metrics(run, loss=1.0)
    stage = status_of(main, run)
    assert (stage["step"], stage["steps"], stage["steps_per_second"]) == (400, 500, 2.0)
    assert stage["seconds_left"] == pytest.approx(50, abs=5)
    assert stage["seconds_since_write"] < 5
    _, out, _ = main("status", tmp_path)
    assert out.startswith("distill-1: unfinished, step 400 of 500, 2 steps/s, about ")


def test_status_of_a_resumed_run_reads_its_last_process(tmp_path: Path, main: Callable) -> None:
    run = write_unfinished(tmp_path / "distill-1", distill={"steps": 500})
    write_metrics(run, loss=1.0)
    with (run / "metrics.jsonl").open("a") as file:
        for step in (300, 301):
            file.write(json.dumps({"seconds": 4.0 * (step - 299), "step": step}) + "\n")
        file.write('{"seconds": 12.0, "st')
    stage = status_of(main, run)
    assert (stage["step"], stage["steps_per_second"]) == (302, 0.25)


def test_ls_shows_no_epsilon_that_the_manifest_does_not_list(
    tmp_path: Path, main: Callable
) -> None:
    write_full_run(tmp_path)
    claim = json.dumps({"private": True, "epsilon": 0.01, "delta": 1e-5, "unit": "one example"})
    # One has another claim in its manifest, and one has none.
    for name in ("tune-1", "warm_start-1"):
        (tmp_path / name / "artifact/privacy.json").write_text(claim)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / FILE_NAME).write_text("{}")
    (tmp_path / "bare/privacy.json").write_text(claim)
    _, out, _ = main("ls", tmp_path, "--json")
    runs = json.loads(out)["runs"]
    assert {run["epsilon"] for run in runs if "transfer" not in run["path"]} == {None}


def test_a_silent_run_gets_no_time_left(tmp_path: Path, main: Callable) -> None:
    run = write_unfinished(tmp_path / "distill-1", distill={"steps": 500})
    write_metrics(run, loss=1.0)
    earlier = time.time() - 600
    os.utime(run / "metrics.jsonl", (earlier, earlier))
    stage = status_of(main, run)
    assert stage["seconds_left"] is None
    assert stage["seconds_since_write"] == pytest.approx(600, abs=5)


def test_of_private_tuning_only_the_checkpoint_is_told(tmp_path: Path, main: Callable) -> None:
    tune = {"steps": 500, "search": None}
    run = write_unfinished(tmp_path / "tune-1", 9, 10, tune=tune, privacy={"steps": 80})
    write_metrics(run, loss=1.0)
    (run / "metrics.jsonl").rename(run / "private_metrics.jsonl")
    known = {name: value for name, value in status_of(main, run).items() if value is not None}
    assert known == {"run": "tune-1", "state": "unfinished", "step": 10, "steps": 80}


def test_of_a_private_search_no_step_is_told(tmp_path: Path, main: Callable) -> None:
    tune = {"steps": 500, "search": {"mean_trials": 3}}
    run = write_unfinished(tmp_path / "tune-1", 10, tune=tune)
    known = {name: value for name, value in status_of(main, run).items() if value is not None}
    assert known == {"run": "tune-1", "state": "unfinished"}


def test_clean_lists_and_removes_unfinished_runs_and_caches_alone(
    tmp_path: Path, main: Callable
) -> None:
    runs = tmp_path / "a/demo"
    write_full_run(runs)
    unfinished = write_unfinished(runs / "tune-target-2a2b3c4d", 3)
    answers = runs / "answers"
    answers.mkdir()
    (answers / "0123456789abcdef.safetensors").write_bytes(b"x" * 2**20)
    # A run that was killed after it had written its result.
    killed = write_unfinished(runs / "tune-3a2b3c4d", 3)
    shutil.copytree(runs / "tune-1/artifact", killed / "artifact")
    busy = write_unfinished(tmp_path / "b/tune-4a2b3c4d")
    (tmp_path / "b/answers").mkdir()
    filled = runs / "teacher-signals-1a2b3c4d"
    filled.mkdir()
    with (busy / "lock").open("w") as lock, (filled / "lock").open("w") as worker:
        assert lock_file(lock)
        # Several workers may fill one folder.
        assert lock_file(worker, shared=True)
        code, out, _ = main("clean", tmp_path)
        assert (code, unfinished.exists()) == (0, True)
        assert f"1.0 MiB  answers of models       {answers}" in out
        code, out, _ = main("clean", tmp_path, "--json")
        found = {each["path"] for each in json.loads(out)["leftovers"]}
        assert found == {str(unfinished), str(answers), str(killed / "checkpoints")}
        code, out, _ = main("clean", tmp_path, "--yes")
        assert code == 0
    for path in (unfinished, answers, killed / "checkpoints"):
        assert not path.exists()
    for kept in (
        runs / "tune-1/artifact",
        killed / "artifact",
        busy,
        filled,
        tmp_path / "b/answers",
    ):
        assert kept.exists()


def test_clean_keeps_what_it_cannot_lock(
    tmp_path: Path,
    main: Callable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On a file system without locks, nothing tells a run in progress from a killed one."""
    run = write_unfinished(tmp_path / "tune-2a2b3c4d", 1)
    cache = tmp_path / "teacher-signals-1a2b3c4d"
    cache.mkdir()
    (cache / "lock").touch()

    def no_locks(*given: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    code, out, _ = main("clean", tmp_path, "--yes")
    assert (code, out.strip()) == (0, "0.0 MiB  in all")
    (line,) = caplog.messages
    assert line.endswith(f"cannot be told from others: {run}")
    assert run.exists()
    assert cache.exists()


def test_clean_names_what_another_user_has_made(
    tmp_path: Path,
    main: Callable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    theirs = write_unfinished(tmp_path / "a/tune-2a2b3c4d", 1)
    ours = write_unfinished(tmp_path / "b/tune-3a2b3c4d", 1)
    closed = tmp_path / "b/answers"
    closed.mkdir()
    # Nothing is forbidden to the user root, so the system's answers are made here.
    opened, listed = Path.open, os.listdir

    def open_lock(path: Path, *given: Any) -> Any:
        if path == theirs / "lock":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *given)

    def list_folder(path: Any) -> list[str]:
        if path == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return listed(path)

    monkeypatch.setattr(Path, "open", open_lock)
    monkeypatch.setattr(os, "listdir", list_folder)
    code, out, _ = main("clean", tmp_path, "--yes")
    assert code == 0
    assert str(ours) in out
    (line,) = caplog.messages
    assert line == f"kept, because they are another user's, or read-only: {theirs}, {closed}"
    assert theirs.exists()
    assert not ours.exists()


def test_clean_removes_nothing_that_only_looks_like_a_run(tmp_path: Path, main: Callable) -> None:
    """A user's own folders, and those of a sender who knows the names, in a folder of documents."""
    sent = write_unfinished(tmp_path / "sent", distill={"steps": 1})
    thesis = tmp_path / "thesis/distill-1a2b3c4d"
    thesis.mkdir(parents=True)
    (thesis / "resolved.yaml").write_text("a: 1")
    run = write_unfinished(tmp_path / "tune-2a2b3c4d")
    kept = [sent / "resolved.yaml", thesis / "resolved.yaml"]
    for place in (tmp_path, sent.parent):
        for name in ("answers/exam.txt", "admitted/2019/post_dist.json", "teacher-signals-a/x"):
            file = place / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}")
            kept.append(file)
    own = tmp_path / "own.txt"
    own.write_text("mine")
    (run / "checkpoints").symlink_to(thesis)
    (run / "link").symlink_to(own)
    code, out, _ = main("clean", tmp_path, "--yes", "--json")
    assert code == 0
    assert [each["path"] for each in json.loads(out)["leftovers"]] == [str(run)]
    assert not run.exists()
    assert all(file.exists() for file in [*kept, own])


def test_clean_that_was_killed_is_completed(
    tmp_path: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_unfinished(tmp_path / "tune-2a2b3c4d", 1, 2)
    (run / "randomness.json").write_text("a key")

    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", interrupt)
        assert main("clean", tmp_path, "--yes")[0] != 0
    assert (run / "randomness.json").exists()
    assert main("clean", tmp_path, "--yes")[0] == 0
    assert not run.exists()


def test_the_newest_run_of_a_stage_has_a_link(tmp_path: Path, main: Callable) -> None:
    for signature in ("1a2b3c4d", "2a2b3c4d"):
        folder = RunFolder(tmp_path / f"demo/tune-target-{signature}", "tune", RunConfig(name="a"))
        folder.path.mkdir(parents=True)
        (folder.path / "resolved.yaml").write_text("{}")
        folder.link_latest()
    assert (tmp_path / "demo/latest/tune-target").resolve() == folder.path
    # It is no run of its own.
    _, out, _ = main("ls", tmp_path, "--json")
    assert len(json.loads(out)["runs"]) == 2


def test_a_key_of_names_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one would stop every later run beside it."""
    folder = RunFolder(tmp_path / "tune-1a2b3c4d", "tune", RunConfig(name="a"), name_key=b"k" * 32)
    with monkeypatch.context() as killed:
        killed.setattr(os, "fdopen", lambda *arguments: os.close(10**6))
        with pytest.raises(InputError), folder.held():
            pass
    assert list(tmp_path.glob(".name_key*")) == []
    with folder.held():
        assert (tmp_path / ".name_key").read_bytes() == b"k" * 32
    (key,) = tmp_path.glob(".name_key*")
    assert key.stat().st_mode & 0o777 == 0o600
    other = replace(folder, name_key=b"o" * 32)
    with pytest.raises(EnvironmentFault), other.held():
        pass


def test_a_stage_that_another_process_has_finished_does_not_run_again(tmp_path: Path) -> None:
    """The artifact may appear between the look at the folder and the lock."""
    folder = RunFolder(tmp_path / "tune-1a2b3c4d", "tune", RunConfig(name="a"))
    assert not folder.finished
    folder.artifact.mkdir(parents=True)
    (folder.artifact / FILE_NAME).write_text("{}")
    with pytest.raises(EnvironmentFault, match="just finished tune"), folder.held():
        pass


def test_an_audit_by_membership_is_a_finished_run(tmp_path: Path, main: Callable) -> None:
    """Its result is no artifact, and took many shadow runs."""
    run = tmp_path / "tiny" / "tune-membership-1a2b3c4d"
    with RunFolder(run, "tune", RunConfig(name="tiny")).held():
        pass
    _, out, _ = main("ls", tmp_path, "--json")
    assert [each["state"] for each in json.loads(out)["runs"]] == ["unfinished"]
    (run / MEMBERSHIP).write_text("{}")
    _, out, _ = main("ls", tmp_path, "--json")
    assert [each["state"] for each in json.loads(out)["runs"]] == ["finished"]
    _, out, _ = main("status", tmp_path / "tiny", "--json")
    assert "unfinished" not in out
    assert main("clean", tmp_path, "--yes")[0] == 0
    assert (run / MEMBERSHIP).is_file()


def test_a_line_of_metrics_that_a_full_disk_has_cut_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricLog(path)
    metrics.write(0, loss=1.0)
    with path.open("a") as file:
        file.write('{"')
    for step in (1, 2):
        metrics.write(step, loss=0.5)
    assert [line["step"] for line in read_metric_log(path)] == [0, 1, 2]
    with path.open("ab") as file:
        for text in (
            b"[1]",
            b"7",
            b'{"seconds": 1}',
            b'{"step": 4, "seconds": 1, "loss": "low"}',
            b'{"step": 4, "seconds": 1, "loss": ' + b"9" * 400 + b"}",
            b'{"step": [4], "seconds": 1}',
            b'{"step": -4, "seconds": 1}',
            b'{"step": true, "seconds": 1}',
            b"[" * 100_000,
            b"\xff\xfe",
        ):
            file.write(text + b"\n")
    metrics.write(3, loss=math.nan)
    assert [line["step"] for line in read_metric_log(path)] == [0, 1, 2, 3]
    with pytest.raises(EnvironmentFault, match="the disk is full"):
        MetricLog(Path("/dev/full")).write(0, loss=1.0)
