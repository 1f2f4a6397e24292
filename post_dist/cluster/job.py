"""What runs in each task of a job: the command line, told by submitit which rank it is."""

import atexit
import os
import sys
from dataclasses import dataclass
from importlib import import_module

from submitit import JobEnvironment
from submitit.core.utils import cloudpickle_dump, temporary_save_path
from submitit.helpers import TorchDistributedEnvironment

from post_dist.runtime.stop import end_process


@dataclass(frozen=True)
class StageJob:
    """One command of one run file. This is all that a job's pickle holds: no code and no state.

    Attributes:
        command: of post-dist, such as `distill` or `bench scale`.
        run: the run file, absolute.
        options: as on the command line.
    """

    command: str
    run: str
    options: tuple[str, ...]

    def __call__(self) -> int:
        """Run it; what a user would see as the exit code becomes the task's."""
        environment = JobEnvironment()
        here = environment.cluster == "local"
        # All GPUs of a node stay visible to its tasks: a rank takes the one with its local number.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if here:  # the name of a laptop often leads nowhere
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        sys.argv = ["post-dist", *self.command.split(), self.run, *self.options]
        # The command line stands above this package; a job starts it as a user does.
        code: int = import_module("post_dist.cli").run_command()
        if code:
            if (
                here
            ):  # where no Slurm tells it, whoever has started the job reads it in submitit's note
                with temporary_save_path(environment.paths.result_pickle) as note:
                    cloudpickle_dump(("success", code), note)
            end_process(code)
        # The stage is done and saved; what follows is submitit's note of it, and then the end of this process.
        atexit.register(end_process, 0)
        return 0
