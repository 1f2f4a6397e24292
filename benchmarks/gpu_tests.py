"""The part `tests` of `on_gpu.py`: the tests marked `gpu`, but those that other parts repeat."""

import subprocess
import sys
from pathlib import Path

from gpu_page import Page

TITLE = "Tests on a GPU"
_ROOT = Path(__file__).resolve().parent.parent
_SELECTED = "not benchmarked"
_LINES = 12


def measure(page: Page) -> None:
    """Run the tests and add their last lines."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "gpu", "-k", _SELECTED, "--durations=5", str(_ROOT / "tests" / "gpu")]
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()[-_LINES:]
    page.add("\n".join(f"    {line}".rstrip() for line in lines) + "\n")
    # 5 says that no test was selected.
    if done.returncode != 0:
        raise SystemExit(f"the tests failed with exit code {done.returncode}")
