"""The text of a batch job that submitit sends.

The files in `slurm/` have the same form, for people who call sbatch themselves.
"""

from typing import Any

from submitit.slurm.slurm import _make_sbatch_string

from post_dist.config.cluster import Cluster, ClusterStage

BEFORE = ("trap 'cancelled=1' TERM",)
AFTER = (
    # A rank that has saved because time is up ends with 6, and the job is queued again. The batch
    # script does it after all its tasks have ended: a task that called scontrol would be killed by
    # that very requeue.
    "code=$?",
    'if [[ $code == 6 && -z ${cancelled:-} ]]; then scontrol requeue "$SLURM_JOB_ID"; fi',
    "exit $code",
)
SRUN = ("--kill-on-bad-exit=1", "--export=ALL")
"""Tasks get the environment of the batch script, even where sbatch was told `--export=NONE`."""


def job_parameters(
    cluster: Cluster, stage: ClusterStage, after: str | None = None
) -> dict[str, Any]:
    """Return what submitit is told about a stage's job.

    Args:
        cluster: the run file's section.
        stage: which stage.
        after: the job that must succeed first; if it does not, this one is cancelled.
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
    # What the run file does not say is left to the cluster's own defaults.
    parameters: dict[str, Any] = {}
    for name, value in resources.items():
        if value is not None:
            parameters[name] = value
    parameters["signal_delay_s"] = cluster.signal_seconds
    parameters["setup"] = [*BEFORE, *cluster.setup]
    parameters["teardown"] = list(AFTER)
    # Since Slurm 22.05, srun ignores the --cpus-per-task of sbatch.
    parameters["srun_args"] = [*SRUN, f"--cpus-per-task={asked.cpus_per_task}"]
    # One log for each task, in the order in which the lines were written.
    parameters["stderr_to_stdout"] = True
    parameters["wckey"] = None
    more: dict[str, Any] = {"requeue": True}
    # Without this, a job whose predecessor failed would wait in the queue for good.
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
