"""Submits stages to Slurm through submitit: all of them are tried first, and a chain of jobs waits for the one before."""

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import submitit

from post_dist.cluster.job import StageJob
from post_dist.cluster.sbatch import job_parameters, job_text
from post_dist.config.cluster import Cluster, ClusterStage
from post_dist.config.schema import RunConfig
from post_dist.errors import EnvironmentFault, InputError, Interrupted
from post_dist.files import writing

_SUBMITIT = "{python} -u -m submitit.core._submit {folder}"
_UNREACHABLE = re.compile(
    "Could not establish a configuration source|Unable to contact slurm controller|Socket timed out"
)
"""How sbatch says that nobody has heard it."""
_YEAR_MINUTES = 365 * 24 * 60


@dataclass(frozen=True)
class Planned:
    """A job that is to be.

    Attributes:
        stage: which stage.
        job: the command that its tasks run.
        cluster: what it asks for.
    """

    stage: ClusterStage
    job: StageJob
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


def planned_jobs(
    config: RunConfig, run: Path, command: str, options: tuple[str, ...]
) -> list[Planned]:
    """The jobs for a command, in their order; `pipeline` makes one for each stage whose result is not given in `inputs`.

    Raises:
        InputError: the run file does not say what one of them needs, or asks for an epsilon that cannot be had.
    """
    run_file, whole = str(run.resolve()), command == "pipeline"
    last = next(
        stage for stage in get_args(ClusterStage) if stage == ("evaluate" if whole else command)
    )
    stages = config.stages_until(last)
    config.need(*stages)
    if not whole:
        return [Planned(last, StageJob(command, run_file, options), config.cluster)]
    from post_dist.privacy.accounting import private_plans  # takes a second

    private_plans(config)
    # The last job runs what the rows of the comparison need beyond the three stages.
    commands = {stage: "pipeline" if stage == "evaluate" else stage for stage in stages}
    return [
        Planned(stage, StageJob(commands[stage], run_file, options), config.cluster)
        for stage in stages
    ]


def scale_jobs(
    config: RunConfig, run: Path, nodes: Sequence[int], settings: Sequence[str]
) -> tuple[list[Planned], list[Path]]:
    """Jobs that measure a step, one on each of these numbers of nodes, and the files that they leave."""
    planned, results = [], []
    for count in nodes:
        distill = config.cluster.distill.model_copy(update={"nodes": count})
        asked = config.cluster.model_copy(update={"distill": distill})
        results.append(
            (
                job_folder(config) / f"scale-{count * asked.for_stage('distill').tasks}-ranks.json"
            ).resolve()
        )
        options = (
            *(f"--set={setting}" for setting in settings),
            f"--output={config.output.resolve()}",
            f"--write={results[-1]}",
        )
        planned.append(
            Planned("distill", StageJob("bench scale", str(run.resolve()), options), asked)
        )
    return planned, results


def job_folder(config: RunConfig) -> Path:
    """Where submitit keeps logs and pickles; every node must see it."""
    return config.output / config.name / "slurm"


def job_texts(config: RunConfig, jobs: list[Planned]) -> list[str]:
    """The batch file of each job, as submitit would send it; the job before has no number yet."""
    folder = job_folder(config)
    command = _SUBMITIT.format(python=shlex.quote(sys.executable), folder=shlex.quote(str(folder)))
    afters = [None, *(f"<{planned.stage}>" for planned in jobs[:-1])]
    return [
        job_text(command, str(folder), job_parameters(planned.cluster, planned.stage, after))
        for planned, after in zip(jobs, afters, strict=True)
    ]


def try_jobs(config: RunConfig, jobs: list[Planned]) -> list[str]:
    """Slurm's answer, for each job, whether and when it would start; nothing is queued.

    Raises:
        EnvironmentFault: there is no Slurm here, or it does not answer.
        InputError: Slurm refuses one of them.
    """
    if shutil.which("sbatch") is None:
        raise EnvironmentFault(
            "sbatch is not here", "submit from a machine of the cluster, or take --local"
        )
    answers = []
    for planned in jobs:
        text = job_text(
            "true", str(job_folder(config)), job_parameters(planned.cluster, planned.stage)
        )
        with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
            file.write(text)
            file.flush()
            asked = subprocess.run(
                ["sbatch", "--test-only", file.name], capture_output=True, text=True, check=False
            )
        answer = (
            asked.stderr.strip().splitlines()[-1] if asked.stderr.strip() else asked.stdout.strip()
        )
        if asked.returncode:
            if _UNREACHABLE.search(asked.stderr):
                raise EnvironmentFault(
                    f"Slurm does not answer: {answer}", "ask whoever runs the cluster, or try again"
                )
            raise InputError(
                f"Slurm refuses the job for {planned.stage}: {answer}",
                f"see `cluster` and `cluster.{planned.stage}` in the run file",
            )
        answers.append(answer.removeprefix("sbatch: "))
    return answers


def submit_jobs(config: RunConfig, jobs: list[Planned], *, chained: bool = True) -> list[Submitted]:
    """Queue all the jobs or none; in a chain each waits for the one before.

    Raises:
        InputError: the folder for their logs cannot be written to.
        EnvironmentFault: Slurm cannot take them.
    """
    executor = submitit.SlurmExecutor(job_folder(config))
    submitted: list[Submitted] = []
    try:
        for planned in jobs:
            after = submitted[-1].job_id if submitted and chained else None
            executor.parameters.clear()
            executor.update_parameters(**job_parameters(planned.cluster, planned.stage, after))
            with writing(executor.folder):
                job = executor.submit(planned.job)
            submitted.append(Submitted(planned.stage, job.job_id, job.paths.stdout, job))
    except BaseException as error:
        for earlier in submitted:
            earlier.job.cancel(check=False)
        if not isinstance(
            error, submitit.core.utils.FailedJobError | submitit.core.utils.FailedSubmissionError
        ):
            raise
        cancelled = ", ".join(earlier.job_id for earlier in submitted)
        hint = (
            f"the jobs before it are cancelled: {cancelled}"
            if cancelled
            else "nothing is left in the queue"
        )
        raise EnvironmentFault(
            f"Slurm does not take the job for {planned.stage}: {error}", hint
        ) from None
    return submitted


def run_here(config: RunConfig, jobs: list[Planned]) -> list[Submitted]:
    """Run the jobs one after the other on this machine, with as many tasks as one node would have and for as long as they take.

    Raises:
        InputError: one asks for several nodes, or the folder for their logs cannot be written to.
        EnvironmentFault: one of them failed.
        Interrupted: one of them was stopped, and has saved.
    """
    for planned in jobs:
        nodes = planned.cluster.for_stage(planned.stage).nodes
        if nodes > 1:
            raise InputError(f"cluster.{planned.stage}.nodes is {nodes}; --local has one node")
    # The lines of `setup` run in bash, as in a batch file; submitit's own way is the shell of the system, which may know no `module`.
    python = shlex.join(
        ["bash", "-c", "\n".join([*config.cluster.setup, 'exec "$@"']), "bash", sys.executable]
    )
    with writing(job_folder(config)):
        executor = submitit.LocalExecutor(job_folder(config), python=python)
    done: list[Submitted] = []
    for planned in jobs:
        asked = planned.cluster.for_stage(planned.stage)
        executor.update_parameters(
            tasks_per_node=asked.tasks, timeout_min=_YEAR_MINUTES, gpus_per_node=asked.gpus_per_node
        )
        with writing(executor.folder):
            job = executor.submit(planned.job)
        done.append(Submitted(planned.stage, job.job_id, job.paths.stdout, job))
        job.wait()
        codes = job.results() if job.exception() is None else [EnvironmentFault.exit_code]
        if codes[0] == Interrupted.exit_code:
            raise Interrupted(
                f"{planned.stage} was stopped", "the same command goes on from its last checkpoint"
            )
        if any(codes):
            raise EnvironmentFault(f"{planned.stage} failed", f"its log: {job.paths.stderr}")
    return done
