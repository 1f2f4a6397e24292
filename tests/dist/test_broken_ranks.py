"""Run the rows of benchmarks/faults-cpu.md once each, with one damage for each damaged file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import killed_ranks
import pytest

# Each file of a checkpoint is damaged in one way here, and in all ways by `make faults`.
LEFT_OUT = (
    "rank0.safetensors flipped",
    "rank0.safetensors deleted",
    "rank1.safetensors truncated",
    "rank1.safetensors deleted",
    "checkpoint.json truncated",
    "checkpoint.json flipped",
)
ROWS = [name for name, _, _ in killed_ranks.rows(1) if not name.endswith(LEFT_OUT)]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict:
    tests = Path(__file__).parents[1]
    environment = os.environ | {
        "PYTHONPATH": str(tests),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        str(tests / "dist" / "killed_ranks.py"),
        str(tmp_path_factory.mktemp("broken")),
        "--rows",
        *ROWS,
    ]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    print(done.stdout)
    assert done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(960)  # the first test waits for all rows
@pytest.mark.parametrize("row", ROWS)
def test_a_broken_run_resumes_and_ends_as_if_nothing_had_happened(broken: dict, row: str) -> None:
    assert row in broken["right"], broken["wrong"].get(row)
