"""Start `post-dist` in a process of its own that has the libraries loaded already.

A new interpreter spends about ten seconds of a core on importing torch, transformers and DeepSpeed.
A fork server imports them once for each worker of pytest. Tests of launchers and of imports start
new interpreters, as users do.
"""

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "post_dist.privacy.private_run",
        "post_dist.stages.pipeline",
        "post_dist.stages.distill.stage",
        "post_dist.stages.transfer.stage",
        "deepspeed.runtime.zero.muon.muon_optimizer",  # DeepSpeed's engine imports it: 3 s
        "jinja2",  # for the report
        "sklearn.feature_extraction.text",
        "sklearn.linear_model",
        "sklearn.metrics",
    ]
)


class Command:
    """A running `post-dist` command, or a running script.

    Args:
        arguments: its command line, without the name of the program.
        variables: environment variables to set, besides those of this process.
        preparation: what `prepared_rank.py` does before the command, by its name.
        script: a Python script to run in place of `post-dist`.
    """

    def __init__(
        self,
        *arguments: object,
        variables: Mapping[str, str] | None = None,
        preparation: str = "nothing",
        script: Path | None = None,
    ) -> None:
        self.arguments = [str(argument) for argument in arguments]
        self._said = tempfile.TemporaryDirectory()
        environment = os.environ | (variables or {})
        self._process = _SERVER.Process(
            target=_run,
            args=(self.arguments, dict(environment), Path(self._said.name), preparation, script),
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while the command runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit code, or None while the command runs."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the command has ended."""
        if self.poll() is None:
            os.kill(self._process.pid, number)

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Wait for the end; return standard output and standard error."""
        self._process.join(timeout)
        if self.poll() is None:
            self._process.kill()
            self._process.join()
            raise subprocess.TimeoutExpired(self.arguments, timeout, *self._read())
        return self._read()

    def _read(self) -> tuple[str, str]:
        folder = Path(self._said.name)
        return (folder / "out").read_text(), (folder / "err").read_text()


def wait_for(command: Command, condition: Callable[[], bool]) -> None:
    """Wait until a condition is true, while a command runs."""
    while not condition():
        assert command.poll() is None, command.communicate()[1]
        time.sleep(0.01)


def run(*arguments: object, timeout: float = 600) -> subprocess.CompletedProcess:
    """Run a `post-dist` command to its end."""
    command = Command(*arguments)
    out, err = command.communicate(timeout)
    return subprocess.CompletedProcess(command.arguments, command.returncode, out, err)


def run_ranks(
    *arguments: object,
    preparations: Sequence[str] = ("nothing", "nothing"),
    script: Path | None = None,
) -> list[subprocess.CompletedProcess]:
    """Run a command on ranks, without a launcher that would end one after the other.

    Args:
        arguments: the command line.
        preparations: what `prepared_rank.py` does before the command, for each rank.
        script: a Python script to run in place of `post-dist`.
    """
    ranks = []
    for preparation, variables in zip(preparations, rank_variables(len(preparations)), strict=True):
        ranks.append(
            Command(*arguments, variables=variables, preparation=preparation, script=script)
        )
    # All run already, so they are waited for one after the other.
    ended = []
    for rank in ranks:
        out, err = rank.communicate(380)
        ended.append(subprocess.CompletedProcess(rank.arguments, rank.returncode, out, err))
    return ended


def run_script(script: Path, ranks: int, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script on ranks; return the exit code and the output of rank 0.

    Raises:
        AssertionError: a rank failed.
    """
    ended = run_ranks(*arguments, preparations=["nothing"] * ranks, script=script)
    for rank in ended:
        assert rank.returncode == 0, rank.stderr[-3000:]
    return ended[0]


def rank_variables(ranks: int) -> list[dict[str, str]]:
    """Return the environment variables that a launcher would set for each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    variables = []
    for rank in range(ranks):
        variables.append(
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
        )
    return variables


def _run(
    arguments: list[str],
    environment: dict[str, str],
    said: Path,
    preparation: str,
    script: Path | None,
) -> None:
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(said / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["post-dist", *arguments]
    # DeepSpeed collects garbage with each of its engines. The libraries are none.
    gc.freeze()
    if script is not None:
        sys.argv = [str(script), *arguments]
        runpy.run_path(str(script), run_name="__main__")
        return
    from post_dist.cli import main

    if preparation != "nothing":
        from prepared_rank import PREPARATIONS

        PREPARATIONS[preparation]()
    main()
