"""Private tuning that is killed anywhere ends as if it had not been.

`make faults` kills it twenty times at each place.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("killed_runs.py")


def killed(folder: Path, *options: str) -> str:
    """Run the driver, and return its table."""
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(DRIVER.parents[1]),
    }
    done = subprocess.run(
        [sys.executable, DRIVER, folder, *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_a_kill_at_any_place_changes_neither_prompt_nor_ledger(tmp_path: Path) -> None:
    assert killed(tmp_path).count("| 1 | 1 | 1 |") == 10


@pytest.mark.parametrize("adapter", ["lora", "prefix"])
def test_a_killed_adapter_ends_as_if_it_had_not_been(tmp_path: Path, adapter: str) -> None:
    places = ("after a backward pass", "after the intent", "after the state")
    found = killed(tmp_path, "--adapter", adapter, "--places", *places)
    assert found.count("| 1 | 1 | 1 |") == len(places)
