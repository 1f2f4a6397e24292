"""Submits stages to Slurm through submitit, or runs them on this machine.

Slurm is asked about all jobs before any of them is queued. In a chain, each job waits for the one
before.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from post_dist.cluster.job import SUBMITTER, Command, Job, RunSource, ScaleJob, StageJob
from post_dist.cluster.sbatch import job_parameters, job_text
from post_dist.config.cluster import Cluster, ClusterStage
from post_dist.config.schema import RunConfig
from post_dist.errors import EnvironmentFault, InputError, Interrupted
from post_dist.files import writing

_SUBMITIT = "{python} -u -m submitit.core._submit {folder}"
_UNREACHABLE = re.compile(
    "Could not establish a configuration source|Unable to contact slurm controller|Socket timed out"
)
"""What sbatch says when no controller answers."""
_YEAR_MINUTES = 365 * 24 * 60


@dataclass(frozen=True)
class Planned:
    """A job that is to be submitted.

    Attributes:
        stage: the stage whose resources it asks for.
        job: what its tasks do.
        cluster: the section of the run file.
    """

    stage: ClusterStage
    job: Job
    cluster: Cluster


@dataclass(frozen=True)
class Submitted:
    """A job that Slurm, or this machine, has taken.

    Attributes:
        stage: which stage.
        job_id: Slurm's number, or the process on this machine.
        log: where rank 0 writes.
        job: submitit's.
    """

    stage: ClusterStage
    job_id: str
    log: Path
    job: submitit.Job[int]


def planned_jobs(config: RunConfig, source: RunSource, command: Command) -> list[Planned]:
    """Plan the jobs for a command, in their order.

    `pipeline` makes one for each stage whose result is not given in `inputs`.

    Args:
        config: the run file as it is now.
        source: where each job reads it again.
        command: a stage, or `pipeline`.

    Raises:
        InputError: the run file lacks a section that a job needs, or no noise reaches its epsilon.
    """
    last: ClusterStage = "evaluate" if command == "pipeline" else command
    stages = config.stages_until(last)
    config.need(*stages)
    # A single stage is not checked further: its job finds out when it starts.
    if command != "pipeline":
        return [Planned(last, StageJob(source, command), config.cluster)]

    from post_dist.privacy.accounting import private_plans  # takes a second

    # A target epsilon out of reach would be found only after hours of distillation.
    private_plans(config)
    planned = []
    for stage in stages:
        # The last job also runs what the rows of the comparison need beyond the three stages.
        job = StageJob(source, "pipeline" if stage == "evaluate" else stage)
        planned.append(Planned(stage, job, config.cluster))
    return planned


def scale_jobs(
    config: RunConfig, source: RunSource, nodes: Sequence[int]
) -> tuple[list[Planned], list[Path]]:
    """Plan jobs that measure a step, one for each number of nodes.

    Returns:
        The jobs, and the file that each will leave.
    """
    # The node must write where this process looks for the result.
    here = RunSource(source.path, source.overrides, str(config.output.resolve()))
    planned = []
    results = []
    for count in nodes:
        distill = config.cluster.distill.model_copy(update={"nodes": count})
        cluster = config.cluster.model_copy(update={"distill": distill})
        ranks = count * cluster.for_stage("distill").tasks
        result = (job_folder(config) / f"scale-{ranks}-ranks.json").resolve()
        results.append(result)
        planned.append(Planned("distill", ScaleJob(here, str(result)), cluster))
    return planned, results


def job_folder(config: RunConfig) -> Path:
    """Return where submitit keeps logs and pickles; every node must see it."""
    return config.output / config.name / "slurm"


def job_texts(config: RunConfig, jobs: list[Planned]) -> list[str]:
    """Return the batch file of each job as submitit would send it.

    The job before has no number yet, so the text names its stage instead.
    """
    folder = job_folder(config)
    command = _SUBMITIT.format(python=shlex.quote(sys.executable), folder=shlex.quote(str(folder)))
    texts = []
    after = None
    for planned in jobs:
        parameters = job_parameters(planned.cluster, planned.stage, after)
        texts.append(job_text(command, str(folder), parameters))
        after = f"<{planned.stage}>"
    return texts


def try_jobs(config: RunConfig, jobs: list[Planned]) -> list[str]:
    """Ask Slurm whether and when each job would start; nothing is queued.

    Returns:
        Slurm's answer for each job.

    Raises:
        EnvironmentFault: there is no Slurm here, or it does not answer.
        InputError: Slurm refuses one of them.
    """
    if shutil.which("sbatch") is None:
        raise EnvironmentFault(
            "sbatch is not here", "submit from a machine of the cluster, or use --local"
        )
    return [_try_job(config, planned) for planned in jobs]


def submit_jobs(config: RunConfig, jobs: list[Planned], *, chained: bool = True) -> list[Submitted]:
    """Queue all the jobs or none.

    Args:
        config: the run file.
        jobs: what to queue.
        chained: whether each job waits for the one before.

    Raises:
        InputError: the folder for their logs cannot be written to.
        EnvironmentFault: Slurm cannot take them.
    """
    executor = submitit.SlurmExecutor(job_folder(config))
    submitted: list[Submitted] = []
    try:
        for planned in jobs:
            after = submitted[-1].job_id if submitted and chained else None
            # submitit keeps parameters from one submission to the next.
            executor.parameters.clear()
            executor.update_parameters(**job_parameters(planned.cluster, planned.stage, after))
            submitted.append(_submit(executor, planned))
    except BaseException as error:  # Ctrl-C too must leave nothing in the queue
        # A chain that is not whole is of no use to anybody.
        for earlier in submitted:
            earlier.job.cancel(check=False)
        if not isinstance(error, FailedJobError | FailedSubmissionError):
            raise
        hint = "nothing is left in the queue"
        if submitted:
            cancelled = ", ".join(earlier.job_id for earlier in submitted)
            hint = f"the jobs before it are cancelled: {cancelled}"
        raise EnvironmentFault(
            f"Slurm does not take the job for {planned.stage}: {error}", hint
        ) from None
    return submitted


def run_here(config: RunConfig, jobs: list[Planned]) -> list[Submitted]:
    """Run the jobs one after the other on this machine, without a time limit.

    Each has as many tasks as it would have on one node. The tasks stop when this process ends.

    Raises:
        InputError: one asks for several nodes, or the folder for their logs cannot be written to.
        EnvironmentFault: one of them failed.
        Interrupted: one of them was stopped, and has saved.
    """
    # Refused before the first job runs.
    for planned in jobs:
        nodes = planned.cluster.for_stage(planned.stage).nodes
        if nodes > 1:
            raise InputError(f"cluster.{planned.stage}.nodes is {nodes}; --local has one node")
    # The lines of `setup` run in bash, as in a batch file. submitit's own way is the system's
    # shell, which may not know `module`.
    setup = "\n".join([*config.cluster.setup, 'exec "$@"'])
    python = shlex.join(["bash", "-c", setup, "bash", sys.executable])
    # submitit's processes outlive the one that starts them, unless they know whom to look for.
    os.environ[SUBMITTER] = str(os.getpid())
    with writing(job_folder(config)):
        executor = submitit.LocalExecutor(job_folder(config), python=python)
    done: list[Submitted] = []
    for planned in jobs:
        asked = planned.cluster.for_stage(planned.stage)
        executor.update_parameters(
            tasks_per_node=asked.tasks, timeout_min=_YEAR_MINUTES, gpus_per_node=asked.gpus_per_node
        )
        submitted = _submit(executor, planned)
        done.append(submitted)
        _wait_here(submitted)
    return done


def _submit(executor: submitit.Executor, planned: Planned) -> Submitted:
    with writing(executor.folder):
        job = executor.submit(planned.job)
    return Submitted(planned.stage, job.job_id, job.paths.stdout, job)


def _try_job(config: RunConfig, planned: Planned) -> str:
    """Ask Slurm about one job, and return its answer."""
    parameters = job_parameters(planned.cluster, planned.stage)
    text = job_text("true", str(job_folder(config)), parameters)
    # sbatch reads a file; `--test-only` asks the scheduler and queues nothing.
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
        file.write(text)
        file.flush()
        asked = subprocess.run(
            ["sbatch", "--test-only", file.name], capture_output=True, text=True, check=False
        )
    lines = asked.stderr.strip().splitlines()
    answer = lines[-1] if lines else asked.stdout.strip()
    if asked.returncode == 0:
        return answer.removeprefix("sbatch: ")
    # A controller that is away is no fault of the run file.
    if _UNREACHABLE.search(asked.stderr):
        raise EnvironmentFault(
            f"Slurm does not answer: {answer}", "ask whoever runs the cluster, or try again"
        )
    raise InputError(
        f"Slurm refuses the job for {planned.stage}: {answer}",
        f"see `cluster` and `cluster.{planned.stage}` in the run file",
    )


def _wait_here(submitted: Submitted) -> None:
    """Wait for a job of this machine to end.

    Raises:
        EnvironmentFault: it failed.
        Interrupted: it was stopped, and has saved.
    """
    job = submitted.job
    job.wait()
    # A task that was killed leaves no result file, and submitit an exception in its place.
    codes = [EnvironmentFault.exit_code]
    if job.exception() is None:
        codes = job.results()
    if codes[0] == Interrupted.exit_code:
        raise Interrupted(
            f"{submitted.stage} was stopped", "the same command resumes from its last checkpoint"
        )
    if any(codes):
        raise EnvironmentFault(f"{submitted.stage} failed", f"its log: {job.paths.stderr}")
