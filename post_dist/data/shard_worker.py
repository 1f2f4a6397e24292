"""A process that tokenizes units of a corpus, and the pool that starts several of them.

The pool writes to a worker's standard input: the work, pickled, then numbers of units, one in each
line. The worker answers on its standard output with a JSON object per line. Processes of the module
`multiprocessing` would run the user's script again if it has no `__main__` guard.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, cast

from post_dist.data.token_parts import TokenizerWork, tokenize_unit
from post_dist.errors import EnvironmentFault, InputError, PostDistError
from post_dist.runtime.watchdog import phase

_PACKAGE_PARENT = Path(__file__).parents[2]


class WorkerPool:
    """Worker processes, each of which makes one unit at a time.

    Args:
        work: the corpus and the tokenizer.
        workers: number of processes.
    """

    def __init__(self, work: TokenizerWork, workers: int) -> None:
        self._processes = [_start() for _ in range(workers)]
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._work = pickle.dumps(work)
        self._informed: set[subprocess.Popen[bytes]] = set()
        for process in self._processes:
            self._idle.put(process)

    def make(self, number: int) -> None:
        """Let a worker make the parts of a unit, and wait for it. Threads may call it.

        Raises:
            PostDistError: the worker cannot make them, or has died.
        """
        process = self._idle.get()
        try:
            # A worker reads its work after its imports. Only this thread waits for that.
            if process not in self._informed:
                self._informed.add(process)
                _send(process, self._work)
            _send(process, b"%d\n" % number)
            _wait_until_made(process)
        finally:
            self._idle.put(process)

    def end(self) -> None:
        """End all workers now. A part that is not finished is lost."""
        for process in self._processes:
            # Parts are renamed when they are complete, so a kill harms none.
            process.kill()
        for process in self._processes:
            process.wait()


def _start() -> subprocess.Popen[bytes]:
    # The worker must run this package, also if the parent found it through `sys.path` alone.
    paths = [str(_PACKAGE_PARENT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )


def _send(process: subprocess.Popen[bytes], message: bytes) -> None:
    try:
        stream = cast(IO[bytes], process.stdin)
        stream.write(message)
        stream.flush()
    # The worker has ended without reading.
    except BrokenPipeError:
        raise _death(process) from None


def _wait_until_made(process: subprocess.Popen[bytes]) -> None:
    for line in cast(IO[bytes], process.stdout):
        # A worker that is killed may leave the beginning of a line.
        if not line.endswith(b"\n"):
            break
        answer: dict[str, Any] = json.loads(line)
        phase(f"tokenizing the corpus, unit {answer['unit']}")
        # Only the fields of the error cross the border of the process.
        if "error" in answer:
            is_input = answer["code"] == InputError.exit_code
            kind = InputError if is_input else EnvironmentFault
            raise kind(answer["error"], answer["hint"])
        if answer["made"]:
            return
    raise _death(process)


def _death(process: subprocess.Popen[bytes]) -> EnvironmentFault:
    return EnvironmentFault(
        f"a process that tokenizes the corpus has ended with exit code {process.wait()}",
        "if it lacked memory, lower corpus.workers; the same command resumes",
    )


def _work() -> None:
    """Make units until the standard input ends."""
    # The parent handles requests to stop. Slurm also signals its children.
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # Libraries may print to standard output. Their lines go to standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        work: TokenizerWork = pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):
        # The parent was killed before it had sent all of the work.
        return
    try:
        for line in sys.stdin.buffer:
            _make(work, int(line), answers)
    except BrokenPipeError:
        # The parent was killed. Its next start makes the unfinished part again.
        os._exit(0)


def _make(work: TokenizerWork, unit: int, answers: IO[str]) -> None:
    def tell(**facts: object) -> None:
        answers.write(json.dumps({"unit": unit, **facts}) + "\n")

    try:
        tokenize_unit(work, unit, lambda: tell(made=False))
    except PostDistError as error:
        tell(error=error.args[0], hint=error.hint, code=error.exit_code)
    else:
        tell(made=True)


if __name__ == "__main__":
    _work()
