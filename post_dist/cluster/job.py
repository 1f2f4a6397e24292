"""What runs in each task of a job: a stage of a run file, whose rank submitit tells.

The pickle of a job holds its class's name and fields, no code and no state. A job therefore runs
the code and the run file that it finds when it starts.
"""

import atexit
import os
import select
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from submitit import JobEnvironment
from submitit.core.utils import cloudpickle_dump, temporary_save_path
from submitit.helpers import TorchDistributedEnvironment

from post_dist import api
from post_dist.config.load import load_run
from post_dist.config.schema import RunConfig
from post_dist.runtime.process import exit_code_of
from post_dist.runtime.ranks import leave_ranks, this_rank
from post_dist.runtime.stop import end_process, listen

SUBMITTER = "POST_DIST_SUBMITTER"
"""Environment variable: the process that waits for a job on this machine."""
_SECONDS_BETWEEN_REQUESTS = 5.0
Command = Literal["distill", "tune", "transfer", "evaluate", "pipeline"]
_RUNS: dict[Command, Callable[[RunConfig], object]] = {
    "distill": api.distill,
    "tune": api.tune,
    "transfer": api.transfer,
    "evaluate": api.evaluate,
    "pipeline": api.pipeline,
}


@dataclass(frozen=True)
class RunSource:
    """Where a job reads its settings from.

    Attributes:
        path: the run file, absolute.
        overrides: as `--set` takes them.
        output: folder for the run folders, absolute, or None for the run file's own.
    """

    path: str
    overrides: tuple[str, ...] = ()
    output: str | None = None

    @classmethod
    def of_command(
        cls, run: Path, overrides: list[str] | None = None, output: Path | None = None
    ) -> "RunSource":
        """Return what the options of a command name, with absolute paths.

        Args:
            run: the run file.
            overrides: the values of `--set`.
            output: the value of `--output`.
        """
        absolute = None if output is None else str(output.resolve())
        return cls(str(run.resolve()), tuple(overrides or ()), absolute)

    def load(self) -> RunConfig:
        """Read and check the run file.

        Raises:
            InputError: see `load_run`.
        """
        output = None if self.output is None else Path(self.output)
        return load_run(Path(self.path), list(self.overrides), output)


@dataclass(frozen=True)
class Job(ABC):
    """What the tasks of a job do; submitit calls it in each of them.

    Attributes:
        source: where the settings are.
    """

    source: RunSource

    @abstractmethod
    def work(self) -> None:
        """Do it; what it raises becomes the exit code of the task."""

    def __call__(self) -> int:
        """Do the work, and end the task with the exit code that a command line would have."""
        environment = JobEnvironment()
        on_this_machine = environment.cluster == "local"
        # All GPUs of a node stay visible to its tasks: a rank uses the one with its local number.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if on_this_machine:
            os.environ["MASTER_ADDR"] = "127.0.0.1"  # the name of a laptop often leads nowhere
            _stop_with_submitter()
        code = exit_code_of(self.work)
        if code:
            # Where no Slurm tells the exit code, the submitter reads it in submitit's result file.
            if on_this_machine:
                with temporary_save_path(environment.paths.result_pickle) as note:
                    cloudpickle_dump(("success", code), note)
            end_process(code)
        # The work is done and saved; submitit's own note follows, and then the end of this process.
        atexit.register(end_process, 0)
        return 0


@dataclass(frozen=True)
class StageJob(Job):
    """A job that runs one stage, or the pipeline with all that is not finished.

    Attributes:
        command: which of them.
    """

    command: Command

    def work(self) -> None:
        """Run it, and print the result on rank 0."""
        listen()
        result = _RUNS[self.command](self.source.load())
        if this_rank() == 0:
            print(result)
        leave_ranks()


@dataclass(frozen=True)
class ScaleJob(Job):
    """A job that measures a step on its ranks.

    Attributes:
        write: the file for the measurement, absolute.
    """

    write: str

    def work(self) -> None:
        """Measure, and write the file on rank 0."""
        from post_dist.bench.start import bench_scale_of

        bench_scale_of(self.source.load(), Path(self.write))
        leave_ranks()


def _stop_with_submitter() -> None:
    """Ask this process to stop when the process that waits for it has ended: nobody else would."""
    submitter = os.environ.get(SUBMITTER)
    if submitter is None or not hasattr(os, "pidfd_open"):  # Linux has it
        return

    # A descriptor of the process: once it has ended, its number may be given to another process.
    def wait() -> None:
        try:
            process = os.pidfd_open(int(submitter))
        except ProcessLookupError:  # it has ended already
            pass
        else:
            select.select([process], [], [])  # readable once the process has ended
        while True:  # a signal that comes before `listen` is lost
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(_SECONDS_BETWEEN_REQUESTS)

    threading.Thread(target=wait, daemon=True, name="submitter").start()
