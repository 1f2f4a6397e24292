"""Private tuning that is killed anywhere ends as if it had not been.

`make faults` kills it twenty times at each place.
"""

import os
import subprocess
import sys
from pathlib import Path

DRIVER = Path(__file__).with_name("killed_runs.py")


def test_a_kill_at_any_place_changes_neither_prompt_nor_ledger(tmp_path: Path) -> None:
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(DRIVER.parents[1]),
    }
    done = subprocess.run(
        [sys.executable, DRIVER, tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("| 1 | 1 | 1 |") == 10
