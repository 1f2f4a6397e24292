"""The benchmarks of distillation and transfer: every way computes the same loss, and none is left out."""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny

PRECISIONS = ("fp32", "bf16")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.write_run(tmp_path_factory.mktemp("bench"))
    tiny.speak_up(made.parent / "teacher")
    return made


def figures(main: Callable, *arguments: object) -> dict:
    code, out, err = main("bench", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def check(found: dict, ways: list[str], unit: str) -> None:
    names = [f"{way} {precision}" for way in ways for precision in PRECISIONS]
    assert [row["name"] for row in found["rows"]] == names
    assert list(found["ratios"]) == names
    assert found["ratios"][names[0]] == 1
    for row in found["rows"]:
        assert row["seconds_per_step"] > 0
        assert row[f"{unit}_per_second"] > 0
    assert found["max_difference"] < 1e-5


def test_distill(run: Path, main: Callable) -> None:
    found = figures(main, "distill", run)
    trl = ["TRL's GKD loss"] if find_spec("trl") else []
    liger = ["Liger's chunked loss"] if find_spec("liger_kernel") else []
    check(
        found,
        ["published loop", "ours", *trl, *liger, "ours, cached", "ours, sampled cache"],
        "tokens",
    )
    assert found["settings"]["student_parameters"] < found["settings"]["teacher_parameters"]


def test_transfer(run: Path, main: Callable) -> None:
    assert main("distill", run)[0] == 0
    found = figures(main, "transfer", run)
    check(found, ["published loop", "ours", "cached, plain torch"], "samples")
    assert found["once"]["rows"] > 0


def test_several_ranks_are_refused(run: Path, post_dist: Callable) -> None:
    launcher = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=29627",
        "-m",
    )
    done = post_dist("bench", "tune", run, "--json", launcher=launcher)
    assert done.returncode != 0
    assert done.stdout == ""
    assert "bench tune compares ways to run a step on one device" in done.stderr
