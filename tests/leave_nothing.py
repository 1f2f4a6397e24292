"""An interrupted test run leaves no process behind, however it ended.

Every process that a test starts inherits a marker in its environment, and so do the processes that
it starts in turn, such as the ranks of a launcher. A guardian waits for the end of pytest, also by
SIGKILL, and then kills whatever still carries the marker. `conftest.py` loads this plugin.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

MARKER = "POST_DIST_TEST_RUN"
_PR_SET_PDEATHSIG = 1
"""Linux: the signal that this process gets when its parent ends."""


def start_guardian() -> None:
    """Mark this test run and start its guardian. The workers of pytest-xdist share one."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    mark = uuid4().hex
    os.environ[MARKER] = mark
    subprocess.Popen(
        [sys.executable, __file__, mark, str(os.getpid())],
        # Ctrl-C in a terminal reaches the whole session of pytest, and must not reach the guardian.
        start_new_session=True,
        stdin=subprocess.DEVNULL,
    )


def processes_with(entry: str) -> list[int]:
    """Return the processes whose environment holds an entry `NAME=value`, but for this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is not ours
            continue
        number = int(folder.name)
        if entry.encode() in environment and number != os.getpid():
            found.append(number)
    return found


def _guard(mark: str, parent: int) -> None:
    # The signal is blocked first, so that it waits for sigwait if it comes at once.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)
    if os.getppid() == parent:
        signal.sigwait({signal.SIGUSR1})
    # A process may just be starting another one, so look again until none is left.
    while left := processes_with(f"{MARKER}={mark}"):
        for number in left:
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


if __name__ == "__main__":
    # The guardian must not find itself: it was started with the marker.
    _guard(sys.argv[1], int(sys.argv[2]))
else:
    start_guardian()
