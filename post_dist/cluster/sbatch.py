"""The parameters and the text of the batch jobs that submitit sends.

The files in `slurm/` have the same form, for people who call sbatch themselves.
"""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import _make_sbatch_string

from post_dist.config.cluster import Cluster, ClusterStage, Resources

BEFORE = ("trap 'cancelled=1' TERM",)
AFTER_SETUP = ("set +e",)
"""Lines after those of the run file or the site, which may have said `set -e`. The shell would then
end with srun, and nobody would queue the job again."""
AFTER = (
    # Exit code 6 means that the ranks have saved because time is up. `restart` decides about it and
    # about failures, such as a dead rank. If it cannot run, a job that has saved goes on.
    # The batch script queues the job again after all tasks have ended. The requeue would kill a
    # task that called scontrol itself.
    "code=$?",
    # The last job of an array has the array's own number, and to requeue that restarts all of them.
    "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
    'restart=("${POST_DIST_PYTHON:-python}" -m post_dist.cluster.restart $code)',
    "if [[ $code != 0 && -z ${cancelled:-} ]] && "
    '{ "${restart[@]}" || [[ $? != 2 && $code == 6 ]]; }; then '
    'scontrol requeue "${job:-$SLURM_JOB_ID}"; fi',
    "exit $code",
)
SRUN = ("--kill-on-bad-exit=1", "--export=ALL")
"""Tasks get the environment of the batch script, even if sbatch ran with `--export=NONE`."""


def job_parameters(
    cluster: Cluster, stage: ClusterStage, folder: Path, dependency: str | None = None
) -> dict[str, Any]:
    """Return submitit's parameters for the job of a stage.

    Args:
        cluster: the run file's section `cluster`.
        stage: the stage.
        folder: folder of the job's logs.
        dependency: what must happen first, as sbatch reads it. If a job that must succeed fails,
            this job is cancelled.
    """
    asked = cluster.for_stage(stage)
    resources = {
        "job_name": job_name(stage),
        "nodes": asked.nodes,
        "ntasks_per_node": asked.tasks,
        "gpus_per_node": None if asked.gres else asked.gpus_per_node or None,
        "gres": asked.gres,
        "cpus_per_task": asked.cpus_per_task,
        "time": asked.time_minutes,
        "mem": asked.memory,
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "exclude": asked.exclude,
        "exclusive": asked.exclusive or None,
        "dependency": dependency,
    }
    # Fields that the run file leaves out keep the cluster's defaults.
    parameters: dict[str, Any] = {}
    for name, value in resources.items():
        if value is not None:
            parameters[name] = value
    parameters["signal_delay_s"] = cluster.signal_seconds
    variables = {
        "POST_DIST_PYTHON": sys.executable,
        "POST_DIST_JOB_FOLDER": str(folder.resolve()),
        "POST_DIST_MAX_RESTARTS": str(cluster.max_restarts),
    }
    parameters["setup"] = [*BEFORE, *_exports(variables), *setup_lines(cluster), *AFTER_SETUP]
    parameters["teardown"] = list(AFTER)
    # Since Slurm 22.05, srun ignores the --cpus-per-task of sbatch.
    parameters["srun_args"] = [*SRUN, f"--cpus-per-task={asked.cpus_per_task}", *_srun(asked)]
    # One log for each task, with all lines in the order in which they were written.
    parameters["stderr_to_stdout"] = True
    parameters["wckey"] = None
    # An own --no-requeue keeps Slurm from queueing the job again, whoever asks for it.
    more: dict[str, Any] = {} if asked.sbatch.get("no-requeue") else {"requeue": True}
    if asked.reservation is not None:
        more["reservation"] = asked.reservation
    # An option that is false is left out. sbatch has no value for "not".
    more |= {name: value for name, value in asked.sbatch.items() if value is not False}
    # Otherwise a job whose predecessor failed would wait in the queue forever.
    if dependency is not None:
        more["kill-on-invalid-dep"] = "yes"
    parameters["additional_parameters"] = more
    return parameters


def job_name(stage: ClusterStage) -> str:
    """Return the name of a stage's job in the queue."""
    return f"post_dist-{stage}"


def setup_lines(cluster: Cluster) -> list[str]:
    """Return the shell lines that a job runs before its tasks start."""
    # A line of `setup` may use or change a variable.
    return [*_exports(cluster.environment), *cluster.setup]


def _exports(variables: Mapping[str, str]) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def _srun(asked: Resources) -> list[str]:
    """Return the options of srun that the run file asks for."""
    options = [] if asked.mpi is None else [f"--mpi={asked.mpi}"]
    container = asked.container
    if container is not None and container.runtime == "pyxis":
        options.append(f"--container-image={container.image}")
        if container.mounts:
            options.append(f"--container-mounts={','.join(map(_with_place, container.mounts))}")
    return [*options, *asked.srun]


def task_python(asked: Resources) -> str:
    """Return the shell command that starts Python in a task."""
    container = asked.container
    if container is None:
        return shlex.quote(sys.executable)
    if container.runtime == "pyxis":
        return shlex.quote(container.python)
    command = ["apptainer", "exec"]
    # Without the drivers of the node, the image sees no GPU.
    if asked.gpus_per_node:
        command.append("--nv")
    for mount in container.mounts:
        command += ["--bind", mount]
    return shlex.join([*command, container.image, container.python])


def _with_place(mount: str) -> str:
    """Write a mount as pyxis reads it: without a place it would mean the image's own folder."""
    return mount if ":" in mount else f"{mount}:{mount}"


def job_text(command: str, folder: str, parameters: dict[str, Any], array: int = 1) -> str:
    """Return the batch file that submitit makes.

    Args:
        command: what each task runs.
        folder: where submitit keeps logs and pickles.
        parameters: see `job_parameters`.
        array: number of equal jobs; more than one become a job array.
    """
    count = array if array > 1 else None
    return _make_sbatch_string(command=command, folder=folder, map_count=count, **parameters)
