"""How a process ends."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys, threading, time
from post_dist.runtime.stop import end_process
atexit.register(print, "tidied up")
"""
ENDS = {
    "past a thread that does not end": "threading.Thread(target=time.sleep, args=(600,)).start(); end_process(6)",
    "when the interpreter would": "atexit.register(end_process, 6); sys.exit(0)",
}


@pytest.mark.parametrize("how", ENDS)
def test_a_process_ends_tidily(how: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM + ENDS[how]], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (6, "tidied up\n", "")
