"""The stages' benchmarks: every variant of a step computes the same loss, and none is left out."""

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
    written = tiny.write_run(tmp_path_factory.mktemp("bench"))
    tiny.speak_up(written.parent / "teacher")
    return written


def bench(main: Callable, *arguments: object) -> dict:
    code, out, err = main("bench", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def check_measurements(measured: dict, names: list[str], unit: str) -> None:
    assert [row["name"] for row in measured["rows"]] == names
    assert list(measured["ratios"]) == names
    assert measured["ratios"][names[0]] == 1
    for row in measured["rows"]:
        assert row["seconds_per_step"] > 0
        assert row[f"{unit}_per_second"] > 0
    assert measured["max_difference"] < 1e-5


def at_each_precision(variants: list[str]) -> list[str]:
    return [f"{variant} {precision}" for variant in variants for precision in PRECISIONS]


def test_distill(run: Path, main: Callable) -> None:
    measured = bench(main, "distill", run)
    variants = ["published loop", "ours"]
    if find_spec("trl"):
        variants.append("TRL's GKD loss")
    if find_spec("liger_kernel"):
        variants.append("Liger's chunked loss")
    variants += ["ours, cached", "ours, sampled cache"]
    check_measurements(measured, at_each_precision(variants), "tokens")
    settings = measured["settings"]
    assert settings["student_parameters"] < settings["teacher_parameters"]


def test_tune_and_transfer(run: Path, main: Callable) -> None:
    assert main("distill", run)[0] == 0

    measured = bench(main, "tune", run)
    variants = [
        "ordinary non-private",
        "opacus hooks",
        "dp",
        "dp shared prefix",
        "non-private shared prefix",
    ]
    check_measurements(measured, variants, "samples")
    assert measured["settings"] == {
        "precision": "float32",
        "rows": 8,
        "tokens": 48,
        "num_virtual_tokens": 5,
    }

    measured = bench(main, "transfer", run)
    variants = at_each_precision(["published loop", "ours", "cached, plain torch"])
    check_measurements(measured, variants, "samples")
    assert measured["once"]["rows"] > 0


def test_compiled_steps_stand_beside_plain_ones(
    run: Path, main: Callable, without_fusion: None
) -> None:
    settings = ("--set=engine.compile=true", "--set=engine.precision=fp32")
    assert main("distill", run)[0] == 0
    for stage, name in (("tune", "dp, compiled"), ("transfer", "ours, compiled fp32")):
        measured = bench(main, stage, run, *settings)
        assert name in measured["ratios"]
        assert measured["max_difference"] < 1e-5


def test_several_ranks_are_refused(run: Path, post_dist: Callable) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
    launcher = (*torchrun, "--master-port=29627", "-m")
    done = post_dist("bench", "tune", run, "--json", launcher=launcher)
    assert done.returncode != 0
    refused = "bench tune compares ways to run a step on one device"
    assert refused in done.stderr
    # Rank 0 alone prints the object.
    assert json.loads(done.stdout)["error"] == refused
