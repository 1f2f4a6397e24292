"""A test run that is interrupted leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
from leave_nothing import processes_with

TESTS = Path(__file__).parents[1]
# A child, a grandchild in the same session, and one in a session of its own, as launchers start.
WAITING_TEST = """
import subprocess, sys

def test_that_waits():
    subprocess.run(["bash", "-c", "sleep 600 & setsid sleep 600 & touch ready; sleep 600"])
"""


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left(tmp_path: Path, number: signal.Signals, workers: int) -> None:
    (tmp_path / "test_waiting.py").write_text(WAITING_TEST)
    mark = f"LOOKED_FOR={uuid4().hex}"
    name, _, value = mark.partition("=")
    environment = os.environ | {name: value, "PYTHONPATH": str(TESTS)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-p", "leave_nothing", f"-n{workers}", "-s"]
    # Where this run is in the background of a shell, SIGINT is ignored, also by its children.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    run = subprocess.Popen(
        [*command, str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    signal.signal(signal.SIGINT, before)
    try:
        wait_until((tmp_path / "ready").exists)
        assert len(processes_with(mark)) >= 5, "pytest, its guardian, bash and three sleeps"
        run.send_signal(number)
        run.wait(timeout=60)
        wait_until(lambda: not processes_with(mark))
    finally:
        for left in processes_with(mark):
            os.kill(left, signal.SIGKILL)
