"""What all tests share: one thread, and helpers that run the command line."""

import gc
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "dist")]

import leave_nothing  # noqa: E402, F401 - starts the guardian of this run
import started  # noqa: E402

from post_dist.runtime.private_process import forgetting_private_data  # noqa: E402

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)

Run = Callable[..., subprocess.CompletedProcess]


def pytest_collection_finish() -> None:
    """Take the libraries out of the garbage that DeepSpeed collects with each of its engines."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the anchors of ledgers out of the home folder of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def forgets_private_data() -> Iterator[None]:
    """Let the next test open connections, whatever this one has read."""
    with forgetting_private_data():
        yield


@pytest.fixture(scope="session")
def post_dist() -> Run:
    """Run `post-dist` in a process of its own, or under a launcher."""

    def run(
        *arguments: object, launcher: tuple[str, ...] = (), timeout: float = 600
    ) -> subprocess.CompletedProcess:
        # A process that has looked for GPUs cannot be forked.
        if not launcher and not torch.cuda.is_available():
            return started.run(*arguments, timeout=timeout)
        launcher = launcher or (sys.executable, "-m")
        return subprocess.run(
            [*launcher, "post_dist", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def main(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Call the command line in this process; it returns exit code, standard output and error."""
    from post_dist import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["post-dist", *map(str, arguments)])
        capsys.readouterr()
        environment = dict(os.environ)
        logger = logging.getLogger("post_dist")
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        try:
            code = cli.run_command()
        finally:
            # A process of its own would leave none of this behind.
            os.environ.clear()
            os.environ.update(environment)
            logger.handlers.clear()
            logger.propagate = True
            for number, handler in handlers.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def without_fusion() -> Iterator[None]:
    """Compile models without the minutes that fusing takes: only what the compiler sees of them."""
    torch._dynamo.reset()
    with torch.compiler.set_stance("default", force_backend="eager"):
        yield
