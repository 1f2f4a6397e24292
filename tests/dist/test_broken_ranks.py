"""Run the rows of benchmarks/faults-cpu.md once each, with one damage for each damaged file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import killed_ranks
import pytest

# One row of each kind is run here. `make test-all` runs the slow ones too, and `make faults` runs
# each of them ten times.
QUICK = (
    "SIGKILL in the student's forward",
    "SIGKILL while a shard is written",
    "SIGKILL behind a slow write",
    "SIGTERM",
    "newest checkpoint's rank1.safetensors flipped",
    "untrained student flipped",
    "newest checkpoint flipped, copies on the node",
    "loss not finite once, ZeRO-3 *",
    "2 ranks, then 1, then 2 *",
)
ROWS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name, _, _ in killed_ranks.rows(1)
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict:
    """Run the chosen rows one after the other, in one process."""
    chosen = [item.callspec.params["row"] for item in request.session.items if is_row(item)]
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
        *chosen,
    ]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    print(done.stdout)
    assert done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def is_row(item: pytest.Item) -> bool:
    """Return whether a test of this session is a row of this file."""
    return item.path == Path(__file__)


@pytest.mark.timeout(960)  # the first test waits for all rows
@pytest.mark.parametrize("row", ROWS)
def test_a_broken_run_resumes_and_ends_as_if_nothing_had_happened(broken: dict, row: str) -> None:
    assert row in broken["right"], broken["wrong"].get(row)
