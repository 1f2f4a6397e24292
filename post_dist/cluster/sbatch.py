"""The text of a batch job: what submitit sends, and the files in `slurm/` for people who call sbatch themselves."""

from collections.abc import Sequence
from typing import Any

from submitit.slurm.slurm import _make_sbatch_string

from post_dist.config.cluster import Cluster, ClusterStage

_STAGES: tuple[ClusterStage, ...] = ("distill", "tune", "transfer", "evaluate")
_LISTEN = ("trap 'cancelled=1' TERM",)
_AFTER = (
    # A rank that has saved because time is up leaves with 6. The job is queued again from here, after all its tasks have ended:
    # a task that does it is killed by the requeue while it waits for the answer.
    "code=$?",
    'if [[ $code == 6 && -z ${cancelled:-} ]]; then scontrol requeue "$SLURM_JOB_ID"; fi',
    "exit $code",
)
# Tasks get the batch script's environment, even where sbatch was told --export=NONE, which srun would else go by.
_SRUN = ("--kill-on-bad-exit=1", "--export=ALL")
_BY_HAND = {
    "distill": "The provider's student: sbatch --nodes 2 slurm/distill.sbatch RUN.yaml [OPTIONS]",
    "tune": "The owner's prompt, in one process: sbatch slurm/tune.sbatch RUN.yaml [OPTIONS]",
    "transfer": "The provider's prompt for the large LLM: sbatch --nodes 2 slurm/transfer.sbatch RUN.yaml [OPTIONS]",
    "evaluate": "The comparison; runs what is missing for it: sbatch slurm/evaluate.sbatch RUN.yaml [OPTIONS]",
}


def job_parameters(
    cluster: Cluster, stage: ClusterStage, after: str | None = None
) -> dict[str, Any]:
    """What submitit is told about a stage's job.

    Args:
        cluster: the run file's section.
        stage: which stage.
        after: the job that must have ended well before; if it does not, this one is cancelled.
    """
    asked = cluster.for_stage(stage)
    known = {
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
        "dependency": f"afterok:{after}" if after else None,
    }
    more = {"requeue": True, **({"kill-on-invalid-dep": "yes"} if after else {})}
    return {name: value for name, value in known.items() if value is not None} | {
        "signal_delay_s": cluster.signal_seconds,
        "setup": [*_LISTEN, *cluster.setup],
        "teardown": list(_AFTER),
        "srun_args": [
            *_SRUN,
            f"--cpus-per-task={asked.cpus_per_task}",
        ],  # since Slurm 22.05 srun does not go by sbatch's
        "stderr_to_stdout": True,
        "wckey": None,
        "additional_parameters": more,
    }


def job_text(command: str, folder: str, parameters: dict[str, Any]) -> str:
    """The batch file that submitit makes of them."""
    return _make_sbatch_string(command=command, folder=folder, **parameters)


def files_by_hand() -> dict[str, str]:
    """The files of `slurm/` by their names; resources are given to sbatch, which lets them win over those in the file."""
    return {f"{stage}.sbatch": _by_hand(stage) for stage in _STAGES}


def _by_hand(stage: ClusterStage) -> str:
    parameters = job_parameters(Cluster(setup=_SITE), stage) | {"use_srun": False}
    parameters["additional_parameters"] |= {"output": f"post_dist-{stage}-%j.log"}
    command = "pipeline" if stage == "evaluate" else stage
    header, _, rest = job_text("\n".join(_task_lines(command)), ".", parameters).partition("\n\n")
    lines = [line for line in rest.splitlines() if "SUBMITIT" not in line]
    text = "\n".join(
        [
            header,
            f"# {_BY_HAND[stage]}",
            "# Rendered by post_dist/cluster/sbatch.py; a site edits site.env alone.",
            "",
            *lines,
        ]
    )
    return text + "\n"


_SITE = (
    'source "${SLURM_SITE_ENV:-slurm/site.env}" || exit 3',
    "site_setup",
    'export PATH="$POST_DIST_VENV/bin:$PATH"',
    '[[ -x $POST_DIST_VENV/bin/post-dist ]] || { echo "POST_DIST_VENV in site.env holds no post-dist: $POST_DIST_VENV" >&2; exit 3; }',
)


def _task_lines(command: str) -> Sequence[str]:
    """One task a rank; each learns who it is from Slurm."""
    return (
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
        f'srun --unbuffered {" ".join(_SRUN)} --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c \\',
        f'  \'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID exec post-dist {command} "$@"\' post-dist "$@"',
    )
