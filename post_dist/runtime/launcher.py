"""Find out which launcher started this process, by the environment variables that it sets."""

import ctypes
import os
import signal
from collections.abc import Mapping

from post_dist.errors import (
    ArtifactRefused,
    EnvironmentFault,
    InputError,
    Interrupted,
    PrivacyRefused,
)

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun and the deepspeed launcher set, and that torch reads."""

FINAL_EXIT_CODES = (
    InputError.exit_code,
    ArtifactRefused.exit_code,
    PrivacyRefused.exit_code,
    Interrupted.exit_code,
)
"""Exit codes after which another start would not help, or was not asked for."""

_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of <sys/prctl.h>."""

ENVIRONMENT_OF_ONE_PROCESS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""Variables for a process that no launcher started. DeepSpeed's engine reads them."""


def find_launcher(environment: Mapping[str, str]) -> str:
    """Name the launcher that started this process; `none` for a process started alone.

    Raises:
        EnvironmentFault: the launcher's variables are incomplete or contradict each other.
    """
    given = [name for name in _TORCHRUN if environment.get(name)]
    # Batch scripts and interactive allocations have SLURM_PROCID and SLURM_NTASKS too.
    in_slurm_step = bool(environment.get("SLURM_STEP_NUM_TASKS"))
    slurm_tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or 1)

    # MASTER_ADDR alone does not count, because some clusters set it for every job.
    if not given or given == ["MASTER_ADDR"]:
        if in_slurm_step and slurm_tasks > 1:
            raise EnvironmentFault(
                f"Slurm started {slurm_tasks} tasks, but RANK and WORLD_SIZE are not set: "
                "each task would run alone",
                "set RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_RANK=$SLURM_LOCALID "
                "MASTER_ADDR MASTER_PORT in each task",
            )
        return "none"

    # If the address were missing, torch would wait forever.
    missing = sorted(set(_TORCHRUN) - set(given))
    if missing:
        raise EnvironmentFault(
            f"{', '.join(given)} are set, but {', '.join(missing)} are not",
            "set all of them or none",
        )
    # torchrun inside a Slurm job sets its own variables in addition to those of Slurm.
    size = _checked_world_size(environment)
    if in_slurm_step and slurm_tasks > 1 and slurm_tasks != size:
        raise EnvironmentFault(
            f"WORLD_SIZE={size} contradicts SLURM_STEP_NUM_TASKS={slurm_tasks}",
            "start one task per rank",
        )
    if environment.get("TORCHELASTIC_RUN_ID"):
        return "torchrun"
    return "srun" if in_slurm_step else "deepspeed or plain environment"


def _checked_world_size(environment: Mapping[str, str]) -> int:
    """Return WORLD_SIZE, after a check that the rank lies within it."""
    try:
        rank = int(environment["RANK"])
        size = int(environment["WORLD_SIZE"])
        int(environment["LOCAL_RANK"])
        int(environment["MASTER_PORT"])
    except ValueError:
        raise EnvironmentFault(
            "RANK, WORLD_SIZE, LOCAL_RANK and MASTER_PORT must be whole numbers"
        ) from None
    if not 0 <= rank < size:
        raise EnvironmentFault(f"RANK={rank} is not below WORLD_SIZE={size}")
    return size


def end_with_launcher(environment: Mapping[str, str]) -> None:
    """Ask the kernel to send this process SIGTERM when torchrun or the deepspeed launcher ends.

    A launcher that is killed cannot end its ranks, which would go on working in the run's folder.
    Slurm ends its tasks itself.
    """
    if environment.get("TORCHELASTIC_RUN_ID") or environment.get("CROSS_RANK"):
        # This call of Linux has no Python function. Other systems lack it.
        prctl = getattr(ctypes.CDLL(None), "prctl", None)
        if prctl is not None:
            prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def keep_from_restarting(exit_code: int, environment: Mapping[str, str]) -> None:
    """End torchrun if another start of its ranks would end in the same way.

    torchrun restarts ranks after any exit code but 0. A wrong run file or a refusal comes again,
    and a run that was asked to stop should not go on.
    """
    # All ranks leave with rank 0's exit code, and torchrun ends them all. Rank 0 must have spoken.
    speaks = environment.get("RANK") == "0"
    under_torchrun = environment.get("TORCHELASTIC_RUN_ID")
    if exit_code in FINAL_EXIT_CODES and speaks and under_torchrun:
        os.kill(os.getppid(), signal.SIGTERM)
