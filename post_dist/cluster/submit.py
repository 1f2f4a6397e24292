"""Submits stages to Slurm through submitit: all of them are tried first, and a chain of jobs waits for the one before."""

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
from post_dist.config.cluster import ClusterStage
from post_dist.config.schema import RunConfig
from post_dist.errors import EnvironmentFault, InputError

_SUBMITIT = "{python} -u -m submitit.core._submit {folder}"


@dataclass(frozen=True)
class Planned:
    """A job that is to be: its stage, and the command that its tasks run."""

    stage: ClusterStage
    job: StageJob


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
    job: submitit.Job[None]


def planned_jobs(config: RunConfig, run: Path, command: str, options: tuple[str, ...]) -> list[Planned]:
    """The jobs for a command, in their order; `pipeline` makes one for each stage whose result is not given in `inputs`.

    Raises:
        InputError: the run file does not say what one of them needs, or asks for an epsilon that cannot be had.
    """
    run_file, whole = str(run.resolve()), command == "pipeline"
    last = next(stage for stage in get_args(ClusterStage) if stage == ("evaluate" if whole else command))
    stages = config.stages_until(last)
    config.need(*stages)
    if not whole:
        return [Planned(last, StageJob(command, run_file, options))]
    from post_dist.privacy.accounting import private_plans  # takes a second

    private_plans(config)
    # The last job runs what the rows of the comparison need beyond the three stages.
    return [Planned(stage, StageJob("pipeline" if stage == "evaluate" else stage, run_file, options)) for stage in stages]


def scale_jobs(config: RunConfig, run: Path, nodes: int, settings: Sequence[str]) -> tuple[RunConfig, list[Planned], Path]:
    """A job that measures a step on so many nodes: the run file with that number, the job, and the file it leaves."""
    asked = {**config.cluster.distill, "nodes": nodes}
    sized = config.model_copy(update={"cluster": config.cluster.model_copy(update={"distill": asked})})
    result = job_folder(config) / f"scale-{nodes * sized.cluster.for_stage('distill').tasks}-ranks.json"
    options = (*(f"--set={setting}" for setting in settings), f"--output={config.output.resolve()}", f"--write={result.resolve()}")
    return sized, [Planned("distill", StageJob("bench scale", str(run.resolve()), options))], result


def job_folder(config: RunConfig) -> Path:
    """Where submitit keeps logs and pickles; every node must see it."""
    return config.output / config.name / "slurm"


def job_texts(config: RunConfig, jobs: list[Planned]) -> list[str]:
    """The batch file of each job, as submitit would send it; the job before has no number yet."""
    folder = job_folder(config)
    command = _SUBMITIT.format(python=shlex.quote(sys.executable), folder=shlex.quote(str(folder)))
    afters = [None, *(f"<{planned.stage}>" for planned in jobs[:-1])]
    return [
        job_text(command, str(folder), job_parameters(config.cluster, planned.stage, after))
        for planned, after in zip(jobs, afters, strict=True)
    ]


def try_jobs(config: RunConfig, jobs: list[Planned]) -> list[str]:
    """Ask Slurm, for each job, whether and when it would start; nothing is queued.

    Raises:
        EnvironmentFault: there is no Slurm here.
        InputError: Slurm refuses one of them.
    """
    if shutil.which("sbatch") is None:
        raise EnvironmentFault("sbatch is not here", "submit from a machine of the cluster, or take --local")
    answers = []
    for planned in jobs:
        text = job_text("true", str(job_folder(config)), job_parameters(config.cluster, planned.stage))
        with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
            file.write(text)
            file.flush()
            asked = subprocess.run(["sbatch", "--test-only", file.name], capture_output=True, text=True, check=False)
        answer = asked.stderr.strip().splitlines()[-1] if asked.stderr.strip() else asked.stdout.strip()
        if asked.returncode:
            raise InputError(
                f"Slurm refuses the job for {planned.stage}: {answer}", f"see `cluster` and `cluster.{planned.stage}` in the run file"
            )
        answers.append(f"{planned.stage}: {answer.removeprefix('sbatch: ')}")
    return answers


def submit_jobs(config: RunConfig, jobs: list[Planned]) -> list[Submitted]:
    """Queue the jobs, each after the one before.

    Raises:
        EnvironmentFault: Slurm cannot take them; those that were queued are cancelled again.
    """
    executor = submitit.SlurmExecutor(job_folder(config))
    submitted: list[Submitted] = []
    try:
        for planned in jobs:
            after = submitted[-1].job_id if submitted else None
            executor.parameters.clear()
            executor.update_parameters(**job_parameters(config.cluster, planned.stage, after))
            job = executor.submit(planned.job)
            submitted.append(Submitted(planned.stage, job.job_id, job.paths.stdout, job))
    except submitit.core.utils.FailedJobError as error:
        for earlier in submitted:
            earlier.job.cancel()
        raise EnvironmentFault(f"Slurm does not take the job for {planned.stage}: {error}", "nothing is left in the queue") from None
    return submitted


def run_here(config: RunConfig, jobs: list[Planned]) -> list[Submitted]:
    """Run the jobs one after the other on this machine, with as many tasks as one node would have.

    Raises:
        EnvironmentFault: one of them failed.
    """
    executor = submitit.LocalExecutor(job_folder(config))
    done: list[Submitted] = []
    for planned in jobs:
        asked = config.cluster.for_stage(planned.stage)
        if asked.nodes > 1:
            raise InputError(f"cluster.{planned.stage}.nodes is {asked.nodes}; --local has one node")
        executor.update_parameters(tasks_per_node=asked.tasks, timeout_min=asked.time_minutes, gpus_per_node=asked.gpus_per_node)
        job = executor.submit(planned.job)
        done.append(Submitted(planned.stage, job.job_id, job.paths.stdout, job))
        job.wait()
        if job.exception() is not None:
            raise EnvironmentFault(f"{planned.stage} failed", f"its log: {job.paths.stderr}")
    return done
