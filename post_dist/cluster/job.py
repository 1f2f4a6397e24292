"""The work of each task of a job: run a stage of a run file. submitit gives the task its rank.

The pickle of a job holds only the name of its class and its fields. So a job runs the code and the
run file that it finds when it starts.
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
from post_dist.results import EvaluationResult
from post_dist.runtime.process import exit_code_of
from post_dist.runtime.ranks import leave_ranks, this_rank
from post_dist.runtime.stop import end_process, leave_in_seconds, listen

SUBMITTER = "POST_DIST_SUBMITTER"
"""Environment variable with the id of the process that waits for a job on this machine."""
_SECONDS_BETWEEN_REQUESTS = 5.0
Command = Literal[
    "corpus", "signals", "distill", "warm_start", "tune", "transfer", "evaluate", "pipeline"
]
_RUNS: dict[Command, Callable[[RunConfig], object]] = {
    "corpus": api.tokenize_corpus,
    "signals": api.write_signals,
    "distill": api.distill,
    "warm_start": api.warm_start,
    "tune": api.tune,
    "transfer": api.transfer,
    "evaluate": api.evaluate,
    "pipeline": api.pipeline,
}


@dataclass(frozen=True)
class RunSource:
    """The source of a job's settings.

    Attributes:
        path: absolute path of the run file.
        overrides: changes of fields, as `--set` takes them.
        output: absolute path that replaces `output` of the run file, or None.
    """

    path: str
    overrides: tuple[str, ...] = ()
    output: str | None = None

    @classmethod
    def of_command(
        cls, run: Path, overrides: list[str] | None = None, output: Path | None = None
    ) -> "RunSource":
        """Make a source from the options of a command, with absolute paths.

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
    """The work of a job. submitit calls this object in each task.

    Attributes:
        source: where the job reads its settings from.
    """

    source: RunSource

    @abstractmethod
    def work(self) -> None:
        """Do the work of a task. An exception becomes the exit code of the task."""

    def __call__(self) -> int:
        """Do the work, and end the task with the exit code that a command line would have."""
        environment = JobEnvironment()
        on_this_machine = environment.cluster == "local"
        # All GPUs of a node stay visible to its tasks. A rank uses the GPU with its local rank.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if on_this_machine:
            os.environ["MASTER_ADDR"] = "127.0.0.1"  # a laptop's name often does not resolve
            _stop_with_submitter()
        code = exit_code_of(self.work)
        if code:
            # Without Slurm, the submitter reads the exit code from submitit's result file.
            if on_this_machine:
                with temporary_save_path(environment.paths.result_pickle) as note:
                    cloudpickle_dump(("success", code), note)
            end_process(code)
        # The work is saved. submitit still writes its result file; then this process ends.
        atexit.register(end_process, 0)
        return 0


@dataclass(frozen=True)
class StageJob(Job):
    """A job that runs one stage, or the pipeline.

    Attributes:
        command: the stage, or `pipeline`.
    """

    command: Command

    def work(self) -> None:
        """Run the command, and print the result on rank 0."""
        listen()
        leave_in_seconds()
        result = _RUNS[self.command](self.source.load())
        if this_rank() == 0:
            # Others may read a log. The scores are in the page, for their owner alone.
            print(result.place if isinstance(result, EvaluationResult) else result)
        leave_ranks()


@dataclass(frozen=True)
class ScaleJob(Job):
    """A job that measures a step on its ranks.

    Attributes:
        write: absolute path of the file for the measurement.
    """

    write: str

    def work(self) -> None:
        """Measure the step, and write the file on rank 0."""
        from post_dist.bench.start import bench_scale_of

        bench_scale_of(self.source.load(), Path(self.write))
        leave_ranks()


def _stop_with_submitter() -> None:
    """Send this process SIGTERM once the process that waits for it has ended."""
    submitter = os.environ.get(SUBMITTER)
    if submitter is None or not hasattr(os, "pidfd_open"):  # Linux has it
        return

    # Watch a descriptor, not the id: the id of an ended process may go to another process.
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
