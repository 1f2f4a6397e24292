"""`post-dist bench scale` on real ranks: where the time goes, and the plan's bytes."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from started import run_script

from post_dist.config.load import load_run
from post_dist.config.schema import RunConfig
from post_dist.data.order import rank_batches
from post_dist.errors import EnvironmentFault
from post_dist.models.size import ModelSize, size_of
from post_dist.planning.cost import Sharding, distill_bytes, transfer_bytes

HERE = Path(__file__).parent
PARTS = ("compute", "input", "wait", "gather", "reduce", "control")
STAGES = ("distill", "transfer")
STUDENT_LAYERS = (0, 3)
PROMPT_TOKENS = 5
FP32_BYTES = 4


def torchrun(ranks: int, port: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    return [*launcher, f"--nproc-per-node={ranks}", f"--master-port={port}"]


# Each setting takes several seconds, and four ranks on two cores are slow.
QUICK = ("ZeRO-2, frozen block", "ZeRO-3", "passes served by twos", "mixture", "slow rank")
OTHERS = ("ZeRO-0", "ZeRO-1", "ZeRO-3, frozen block", "two passes", "slow rank")
WITH_FOUR_RANKS = ("ZeRO-3", "two passes", "slow rank")


@pytest.mark.parametrize(
    ("ranks", "settings", "options"),
    [
        (2, QUICK, []),
        pytest.param(2, OTHERS, [], marks=pytest.mark.slow),
        pytest.param(4, WITH_FOUR_RANKS, ["engine.shard_group=2"], marks=pytest.mark.slow),
    ],
)
def test_measured_bytes_are_the_planned_ones(
    tmp_path: Path, ranks: int, settings: tuple[str, ...], options: list[str]
) -> None:
    config = load_run(tiny.write_run(tmp_path), options, None)
    tiny.write_run(tmp_path / "mixture", "deepseek_v3")
    arguments = (tmp_path, ";".join(settings), *options)
    done = run_script(HERE / "scaled_ranks.py", ranks, *arguments)
    measured = json.loads(done.stdout.splitlines()[-1])
    assert tuple(measured) == settings
    sharding = Sharding(ranks=ranks, group=2, bytes_each=FP32_BYTES)

    for row in measured.pop("slow rank")["rows"]:
        assert row["straggler"].startswith(f"rank {ranks - 1} on ")
        waits = [rank["wait"] for rank in row["per_rank"]]
        assert min(waits) == waits[-1] < 0.5 * waits[0], "the others wait for it"

    for name, result in measured.items():
        teacher = size_of((tmp_path / name if name == "mixture" else tmp_path) / "teacher")
        order = [(row["stage"], row["scaling"]) for row in result["rows"]]
        assert order == [(stage, scaling) for stage in STAGES for scaling in ("strong", "weak")]
        for row in result["rows"]:
            received = row["received_bytes"]
            assert received["control"] < 4096
            if row["stage"] == "transfer":
                planned = transfer_bytes(teacher, PROMPT_TOKENS * teacher.width, sharding)
            else:
                planned = planned_distill_bytes(name, config, teacher, result, row, sharding)
            found = {kind: received[kind] for kind in planned}
            assert found == planned, (name, row["scaling"], row["stage"])


def planned_distill_bytes(
    name: str, config: RunConfig, teacher: ModelSize, result: dict, row: dict, sharding: Sharding
) -> dict:
    at_most = 1 if "passes" in name else config.distill.micro_batch_size_per_gpu
    ranks = result["ranks"]
    passes = len(rank_batches(range(row["batch_size"]), at_most, 0, ranks))
    of_teacher = math.ceil(passes / 2) if name == "passes served by twos" else passes
    frozen_layers = 1 if name.endswith("frozen block") else 0
    student = teacher.cut(STUDENT_LAYERS).above(frozen_layers)
    trained = sum(sum(layer.weights) for layer in student.layers)
    return distill_bytes(
        teacher,
        student,
        sharding,
        trained=trained,
        zero_stage=result["zero_stage"],
        passes=passes,
        teacher_passes=of_teacher,
    )


def test_measurements_on_one_and_two_ranks_are_merged(
    tmp_path: Path, post_dist: Callable, main: Callable
) -> None:
    run = tiny.write_run(tmp_path)
    one_file = tmp_path / "kept" / "1.json"
    two_file = tmp_path / "kept" / "2.json"
    code, out, err = main("bench", "scale", run, f"--write={one_file}", "--json")
    assert code == 0, err
    one = json.loads(one_file.read_text())
    assert json.loads(out) == one
    launcher = (*torchrun(2, 29621), "-m")
    done = post_dist("bench", "scale", run, f"--write={two_file}", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert "straggler" in done.stdout
    two = json.loads(two_file.read_text())
    for row in two["rows"]:
        for rank in row["per_rank"]:
            assert all(rank[part] >= 0 for part in PARTS)
            assert sum(rank[part] for part in PARTS) > 0
    assert not list(tmp_path.glob("runs/bench-scale-*")), "the untrained student is deleted"

    code, out, err = main("report", two_file, one_file, "--json")
    assert code == 0, err
    merged = json.loads(out)
    assert Path(merged["figure"]).read_bytes().startswith(b"\x89PNG")
    rows = merged["scaling"]
    order = [(row["scaling"], row["gpus"]) for row in rows]
    assert order == [("strong", 1), ("strong", 2), ("weak", 1), ("weak", 2)]
    assert [row["distill_efficiency"] for row in rows[::2]] == [1, 1]
    weak_rate = distill_rate(two, "weak")
    assert rows[3]["distill_efficiency"] == pytest.approx(
        weak_rate / distill_rate(one, "strong") / 2
    )
    assert main("report", one_file)[1].startswith("strong scaling, 1 GPUs")


def distill_rate(measured: dict, scaling: str) -> float:
    for row in measured["rows"]:
        if row["stage"] == "distill" and row["scaling"] == scaling:
            return row["tokens_per_second"]
    raise AssertionError(f"no row of distill with {scaling} scaling")


def test_a_masked_teacher_is_measured_on_masked_text(tmp_path: Path, main: Callable) -> None:
    code, out, err = main("bench", "scale", tiny.write_run(tmp_path, "roberta"), "--json")
    assert code == 0, err
    assert [row["stage"] for row in json.loads(out)["rows"]] == list(STAGES)


@pytest.mark.parametrize("command", ["scale", "fabric"])
def test_a_file_that_cannot_be_written_is_refused_before_the_measurement(
    tmp_path: Path, main: Callable, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def measure(*given: object) -> None:
        raise EnvironmentFault("it measures")

    monkeypatch.setattr("post_dist.bench.scale.bench_scale", measure)
    monkeypatch.setattr("post_dist.bench.fabric.measure_fabric", measure)
    run = [tiny.write_run(tmp_path)] if command == "scale" else []
    code, _, err = main("bench", command, *run, f"--write={tmp_path}")
    assert code == 2
    assert f"cannot write {tmp_path}: Is a directory" in err
    kept = tmp_path / "kept"
    kept.write_text("an older measurement")
    for path in (kept, tmp_path / "new" / "a.json"):
        assert main("bench", command, *run, f"--write={path}")[0] == 3
    assert kept.read_text() == "an older measurement"
    assert not list((tmp_path / "new").iterdir())


def test_missing_sections_are_named_at_once(tmp_path: Path, main: Callable) -> None:
    run = tiny.write_run(tmp_path)
    kept = []
    for line in run.read_text().splitlines(keepends=True):
        if not line.startswith(("corpus:", "public_task:")):
            kept.append(line)
    run.write_text("".join(kept))
    code, out, err = main("bench", "scale", run, "--json")
    refused = "the run file lacks the sections corpus, public_task"
    assert (code, json.loads(out)["error"]) == (2, refused)
    assert refused in err


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("other.json", "other.json is not a measurement of steps"),
        ("none.json", "none.json does not exist"),
        (".", "holds no finished evaluation"),
    ],
)
def test_other_files_are_no_measurements(
    tmp_path: Path, main: Callable, path: str, message: str
) -> None:
    (tmp_path / "other.json").write_text("{}")
    code, out, err = main("report", tmp_path / path)
    assert (code, out) == (2, "")
    assert message in err
