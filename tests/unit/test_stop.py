"""How a process ends."""

import subprocess
import sys

PROGRAM = """
import atexit, threading, time
from post_dist.runtime.stop import end_process
threading.Thread(target=time.sleep, args=(600,)).start()
atexit.register(print, "tidied up")
end_process(6)
"""


def test_a_process_ends_past_a_thread_that_does_not() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (6, "tidied up\n"), done.stderr
