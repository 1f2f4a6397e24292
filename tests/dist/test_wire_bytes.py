"""The formulas of what goes over the wires against every collective that real ranks call."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from post_dist.planning.cost import distill_bytes, transfer_bytes
from post_dist.planning.sizes import size_of

HERE = Path(__file__).parent


@pytest.mark.parametrize(("ranks", "group", "options"), [(2, 2, []), (4, 2, ["engine.shard_group=2"])])
def test_bytes_are_as_reckoned(tmp_path: Path, ranks: int, group: int, options: list[str]) -> None:
    tiny.write_run(tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "29620"]
    program = [*launcher, HERE / "wire_bytes.py", tmp_path, *options]
    done = subprocess.run(program, capture_output=True, text=True, timeout=280, check=False, env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(HERE.parent)})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    teacher = size_of(tmp_path / "teacher")
    student = teacher.cut((0, 3))
    trained = sum(sum(layer.weights) for layer in student.layers)
    common = {"group": group, "ranks": ranks, "bytes_each": 4}
    expected = {f"distill, ZeRO-{stage}": distill_bytes(teacher, trained, student, zero_stage=stage, passes=1, **common) for stage in range(4)}
    expected["distill, two passes"] = distill_bytes(teacher, trained, student, zero_stage=1, passes=2, **common)
    expected |= {f"transfer, {scores}": transfer_bytes(teacher, 5, **common) for scores in ("vocabulary", "classes")}
    for name, by_kind in expected.items():
        assert {kind: found[name].get(kind, 0) for kind in by_kind} == by_kind, name
        assert found[name].get("small", 0) < 4096
