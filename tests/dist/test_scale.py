"""`post-dist bench scale` on real ranks: the formulas of what goes over the wires against every collective, and where the time goes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from post_dist.config.load import load_run
from post_dist.data.order import rank_batches
from post_dist.models.size import size_of
from post_dist.planning.cost import Sharding, distill_bytes, transfer_bytes

HERE = Path(__file__).parent
PARTS = ("compute", "input", "wait", "gather", "reduce", "control")


@pytest.mark.parametrize(
    ("ranks", "group", "options"), [(2, 2, []), (4, 2, ["engine.shard_group=2"])]
)
def test_bytes_are_as_reckoned(tmp_path: Path, ranks: int, group: int, options: list[str]) -> None:
    config = load_run(tiny.write_run(tmp_path), options, None)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--master-port",
        "29620",
    ]
    program = [*launcher, HERE / "scaled_ranks.py", tmp_path, *options]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(HERE.parent),
    }
    done = subprocess.run(
        program, capture_output=True, text=True, timeout=280, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    teacher = size_of(tmp_path / "teacher")
    whole = teacher.cut((0, 3))
    sharding = Sharding(ranks=ranks, group=group, bytes_each=4)
    measured = json.loads(done.stdout.splitlines()[-1])
    for row in measured.pop("slow rank")["rows"]:
        assert row["straggler"].startswith(f"rank {ranks - 1} on ")
        waits = [rank["wait"] for rank in row["per_rank"]]
        assert min(waits) == waits[-1] < 0.5 * waits[0], "the others wait for it"
    for name, found in measured.items():
        assert [(row["scaling"], row["stage"]) for row in found["rows"]] == [
            (kind, stage) for stage in ("distill", "transfer") for kind in ("strong", "weak")
        ]
        for row in found["rows"]:
            received = row["received_bytes"]
            assert received["control"] < 4096
            if row["stage"] == "transfer":
                expected = transfer_bytes(teacher, 5, sharding)
            else:
                micro = 1 if name == "two passes" else config.distill.micro_batch_size_per_gpu
                passes = len(rank_batches(range(row["batch_size"]), micro, 0, ranks))
                student = whole.above(int(name.endswith("frozen block")))
                trained = sum(sum(layer.weights) for layer in student.layers)
                expected = distill_bytes(
                    teacher,
                    student,
                    sharding,
                    trained=trained,
                    zero_stage=found["zero_stage"],
                    passes=passes,
                )
            assert {kind: received[kind] for kind in expected} == expected, (
                name,
                row["scaling"],
                row["stage"],
            )


def test_measurements_on_one_and_two_ranks_are_merged(
    tmp_path: Path, post_dist: Callable, main: Callable
) -> None:
    run, one, two = (
        tiny.write_run(tmp_path),
        tmp_path / "kept" / "1.json",
        tmp_path / "kept" / "2.json",
    )
    code, out, err = main("bench", "scale", run, f"--write={one}", "--json")
    assert code == 0, err
    assert json.loads(out) == json.loads(one.read_text())
    launcher = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=29621",
        "-m",
    )
    done = post_dist("bench", "scale", run, f"--write={two}", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert "straggler" in done.stdout
    for row in json.loads(two.read_text())["rows"]:
        for rank in row["per_rank"]:
            assert all(rank[part] >= 0 for part in PARTS)
            # The parts are those of a step that waits for each collective, beside the step as it is.
            assert (
                0.5 * row["step_seconds"]
                < sum(rank[part] for part in PARTS)
                < 4 * row["step_seconds"]
            )
    assert not list(tmp_path.glob("runs/bench-scale-*")), "the untrained student is gone"

    code, out, err = main("report", two, one, "--json")
    assert code == 0, err
    merged = json.loads(out)
    assert Path(merged["figure"]).read_bytes().startswith(b"\x89PNG")
    rows = merged["scaling"]
    assert [(row["scaling"], row["gpus"]) for row in rows] == [
        ("strong", 1),
        ("strong", 2),
        ("weak", 1),
        ("weak", 2),
    ]
    assert [row["distill_efficiency"] for row in rows[::2]] == [1, 1]
    tokens = {
        (row["ranks"], kind): each["tokens_per_second"]
        for row in (json.loads(one.read_text()), json.loads(two.read_text()))
        for each in row["rows"]
        if each["stage"] == "distill"
        for kind in [each["scaling"]]
    }
    assert rows[3]["distill_efficiency"] == pytest.approx(
        tokens[2, "weak"] / tokens[1, "strong"] / 2
    )
    assert main("report", one)[1].startswith("strong scaling, 1 GPUs")


def test_a_masked_teacher_is_measured_on_masked_text(tmp_path: Path, main: Callable) -> None:
    code, out, err = main("bench", "scale", tiny.write_run(tmp_path, "roberta"), "--json")
    assert code == 0, err
    assert [row["stage"] for row in json.loads(out)["rows"]] == ["distill", "transfer"]


def test_other_files_are_no_measurements(tmp_path: Path, main: Callable) -> None:
    (tmp_path / "other.json").write_text("{}")
    for path, wanted in (
        ("other.json", "not all of these files are measurements"),
        ("none.json", "none.json is not there"),
        (".", "holds no finished evaluation"),
    ):
        code, out, err = main("report", tmp_path / path)
        assert (code, out) == (2, "")
        assert wanted in err
