"""`post-dist bench scale` on real ranks: the formulas of what goes over the wires against every collective, and where the time goes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from post_dist.config.load import load_run
from post_dist.data.order import shares
from post_dist.planning.cost import distill_bytes, transfer_bytes
from post_dist.planning.sizes import size_of

HERE = Path(__file__).parent


@pytest.mark.parametrize(("ranks", "group", "options"), [(2, 2, []), (4, 2, ["engine.shard_group=2"])])
def test_bytes_are_as_reckoned(tmp_path: Path, ranks: int, group: int, options: list[str]) -> None:
    config = load_run(tiny.write_run(tmp_path), options, None)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "29620"]
    program = [*launcher, HERE / "scaled_ranks.py", tmp_path, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(program, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    teacher = size_of(tmp_path / "teacher")
    student = teacher.cut((0, 3))
    trained = sum(sum(layer.weights) for layer in student.layers)
    common = {"group": group, "ranks": ranks, "bytes_each": 4}
    measured = json.loads(done.stdout.splitlines()[-1])
    for row in measured.pop("slow rank")["rows"]:
        assert row["straggler"].startswith(f"rank {ranks - 1} on ")
        waits = [rank["wait"] for rank in row["per_rank"]]
        assert min(waits) == waits[-1] < 0.5 * waits[0], "the others wait for it"
    for name, found in measured.items():
        assert [(row["scaling"], row["stage"]) for row in found["rows"]] == [(kind, stage) for stage in ("distill", "transfer") for kind in ("strong", "weak")]
        for row in found["rows"]:
            received = row["received_bytes"]
            assert received["control"] < 4096
            if row["stage"] == "transfer":
                expected = transfer_bytes(teacher, 5, **common)
            else:
                micro = 1 if name == "two passes" else config.distill.micro_batch_size_per_gpu
                passes = len(shares(range(row["batch_size"]), micro, 0, ranks))
                expected = distill_bytes(teacher, trained, student, zero_stage=found["zero_stage"], passes=passes, **common)
            assert {kind: received[kind] for kind in expected} == expected, (name, row["scaling"], row["stage"])
