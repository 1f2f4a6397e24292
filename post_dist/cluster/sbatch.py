"""The parameters and the text of the batch jobs that submitit sends.

The files in `slurm/` have the same form, for people who call sbatch themselves.
"""

from typing import Any

from submitit.slurm.slurm import _make_sbatch_string

from post_dist.config.cluster import Cluster, ClusterStage

BEFORE = ("trap 'cancelled=1' TERM",)
AFTER = (
    # Exit code 6 means that the ranks have saved because time is up, so the job is queued again.
    # The batch script does this after all tasks have ended. The requeue would kill a task that
    # called scontrol itself.
    "code=$?",
    'if [[ $code == 6 && -z ${cancelled:-} ]]; then scontrol requeue "$SLURM_JOB_ID"; fi',
    "exit $code",
)
SRUN = ("--kill-on-bad-exit=1", "--export=ALL")
"""Tasks get the environment of the batch script, even if sbatch ran with `--export=NONE`."""


def job_parameters(
    cluster: Cluster, stage: ClusterStage, after: str | None = None
) -> dict[str, Any]:
    """Return submitit's parameters for the job of a stage.

    Args:
        cluster: the run file's section `cluster`.
        stage: the stage.
        after: id of the job that must succeed first. If it fails, this job is cancelled.
    """
    asked = cluster.for_stage(stage)
    resources = {
        "job_name": f"post_dist-{stage}",
        "nodes": asked.nodes,
        "ntasks_per_node": asked.tasks,
        "gpus_per_node": asked.gpus_per_node or None,
        "cpus_per_task": asked.cpus_per_task,
        "time": asked.time_minutes,
        "mem": asked.memory,
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "dependency": None if after is None else f"afterok:{after}",
    }
    # Fields that the run file leaves out keep the cluster's defaults.
    parameters: dict[str, Any] = {}
    for name, value in resources.items():
        if value is not None:
            parameters[name] = value
    parameters["signal_delay_s"] = cluster.signal_seconds
    parameters["setup"] = [*BEFORE, *cluster.setup]
    parameters["teardown"] = list(AFTER)
    # Since Slurm 22.05, srun ignores the --cpus-per-task of sbatch.
    parameters["srun_args"] = [*SRUN, f"--cpus-per-task={asked.cpus_per_task}"]
    # One log for each task, with all lines in the order in which they were written.
    parameters["stderr_to_stdout"] = True
    parameters["wckey"] = None
    more: dict[str, Any] = {"requeue": True}
    # Otherwise a job whose predecessor failed would wait in the queue forever.
    if after is not None:
        more["kill-on-invalid-dep"] = "yes"
    parameters["additional_parameters"] = more
    return parameters


def job_text(command: str, folder: str, parameters: dict[str, Any]) -> str:
    """Return the batch file that submitit makes.

    Args:
        command: what each task runs.
        folder: where submitit keeps logs and pickles.
        parameters: see `job_parameters`.
    """
    return _make_sbatch_string(command=command, folder=folder, **parameters)
