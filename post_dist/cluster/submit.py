"""Submit stages to Slurm through submitit, or run them on this machine.

Slurm is asked about all jobs before any of them is queued. In a chain, each job waits for the
success of the previous one. `distill` waits only for the start of the workers of `signals`: it
trains as their files arrive, and makes the files of workers that died.
"""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from post_dist.cluster.job import SUBMITTER, Command, Job, RunSource, ScaleJob, StageJob
from post_dist.cluster.sbatch import (
    job_name,
    job_parameters,
    job_text,
    setup_lines,
    task_python,
)
from post_dist.config.cluster import Cluster, ClusterStage
from post_dist.config.schema import RunConfig, Stage
from post_dist.errors import (
    EnvironmentFault,
    InputError,
    Interrupted,
    command_line,
    first_line,
)
from post_dist.files import make_folder, writing

_UNREACHABLE = re.compile(
    "Could not establish a configuration source|Unable to contact slurm controller|Socket timed out"
)
"""Messages of sbatch if no controller answers."""
_YEAR_MINUTES = 365 * 24 * 60


@dataclass(frozen=True)
class Planned:
    """A job that has not been submitted yet.

    Attributes:
        stage: the stage whose resources it requests.
        job: the work of its tasks.
        cluster: the run file's section `cluster`.
    """

    stage: ClusterStage
    job: Job
    cluster: Cluster

    @property
    def array(self) -> int:
        """Number of equal jobs that Slurm gets: one, or one for each worker of `signals`."""
        return max(1, self.cluster.signals.workers) if self.stage == "signals" else 1


@dataclass(frozen=True)
class Submitted:
    """A submitted job.

    Attributes:
        stage: name of the stage.
        job_id: Slurm's job id, or the process id on this machine.
        log: log file of rank 0.
        job: submitit's object for the job.
    """

    stage: ClusterStage
    job_id: str
    log: Path
    job: submitit.Job[int]


def planned_jobs(config: RunConfig, source: RunSource, command: Command) -> list[Planned]:
    """Plan the jobs of a command, in the order of the stages.

    `pipeline` gets one job for each stage whose result is not given in `inputs`. If it distills,
    the corpus is tokenized first, so that no GPU waits for it. With `cluster.signals.workers`, the
    corpus and these workers come before `distill`, in a pipeline or alone.

    Args:
        config: the run file as it is now.
        source: where each job reads the run file again.
        command: a stage, `corpus`, `signals`, or `pipeline`.

    Raises:
        InputError: the run file lacks a section that a job needs, or no noise multiplier reaches
            its target epsilon.
    """
    if command in ("corpus", "signals"):
        config.need("distill")
        return [Planned(command, StageJob(source, command), config.cluster)]
    last: Stage = "evaluate" if command == "pipeline" else command
    stages = config.stages_until(last)
    config.need(*stages)
    planned = _before_distill(config, source, command) if "distill" in stages else []
    # A single stage is not checked further: its job finds out when it starts.
    if command != "pipeline":
        return [*planned, Planned(last, StageJob(source, command), config.cluster)]

    from post_dist.privacy.calibration import private_plans  # takes a second

    # Otherwise an unreachable target epsilon would be found only after hours of distillation.
    private_plans(config)
    for stage in stages:
        # The last job also runs the baselines that the table's rows need.
        job = StageJob(source, "pipeline" if stage == "evaluate" else stage)
        planned.append(Planned(stage, job, config.cluster))
    return planned


def _before_distill(config: RunConfig, source: RunSource, command: Command) -> list[Planned]:
    """Plan the jobs that make what `distill` reads."""
    if config.cluster.signals.workers:
        wanted: tuple[Command, ...] = ("corpus", "signals")
    else:
        wanted = ("corpus",) if command == "pipeline" else ()
    return [planned for each in wanted for planned in planned_jobs(config, source, each)]


def scale_jobs(
    config: RunConfig, source: RunSource, nodes: Sequence[int]
) -> tuple[list[Planned], list[Path]]:
    """Plan jobs that measure a step, one for each number of nodes.

    Returns:
        The jobs, and the file that each will write.
    """
    # Each node must write to the folder in which the user looks for the result.
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
    """Return the folder for submitit's logs and pickles. Every node must see it.

    Raises:
        InputError: its path cannot stand in a batch file.
    """
    folder = config.output / config.name / "slurm"
    # submitit makes the path absolute, so the folder that this process is in counts too.
    whole = str(folder.absolute())
    # Slurm and submitit read `%` in the path of a log as the start of a pattern such as %j, and
    # they do not agree on an escape for it. A backslash turns off all patterns in Slurm.
    pattern = next((each for each in "%\\" if each in whole), None)
    if pattern is not None:
        raise InputError(
            f"output: {whole!a} has a {pattern}, which Slurm reads as a pattern in the path of a "
            "log",
            "give another --output",
        )
    if not whole.isprintable():
        raise InputError(
            f"output: {whole!a} has a character that cannot stand in a batch file",
            "give another --output",
        )
    return folder


def _made_job_folder(config: RunConfig) -> Path:
    """Create the folder for submitit's logs and pickles, and return it.

    Raises:
        InputError: it cannot be written to.
    """
    folder = job_folder(config)
    make_folder(folder)
    with writing(folder):
        # A job runs what the pickles say, so nobody else may put one there.
        mode = stat.S_IMODE(folder.stat().st_mode) & ~0o022
        # The logs of private stages are for their owner alone, as their run folders are.
        if config.private_task is not None:
            mode &= 0o700
        folder.chmod(mode)
    return folder


def job_texts(config: RunConfig, jobs: list[Planned]) -> list[str]:
    """Return the batch file of each job as submitit would send it.

    The previous job has no id yet, so the text names its stage instead.
    """
    folder = job_folder(config)
    texts = []
    earlier: list[tuple[ClusterStage, str]] = []
    for planned in jobs:
        python = task_python(planned.cluster.for_stage(planned.stage))
        command = f"{python} -u -m submitit.core._submit {shlex.quote(str(folder))}"
        after = _dependency(earlier)
        parameters = job_parameters(planned.cluster, planned.stage, folder, after)
        texts.append(job_text(command, str(folder), parameters, planned.array))
        earlier.append((planned.stage, f"<{planned.stage}>"))
    return texts


def try_jobs(config: RunConfig, jobs: list[Planned]) -> list[str]:
    """Ask Slurm whether and when each job would start; nothing is queued.

    Returns:
        Slurm's answer for each job.

    Raises:
        EnvironmentFault: there is no Slurm here, or it does not answer.
        InputError: Slurm refuses a job.
    """
    if shutil.which("sbatch") is None:
        raise EnvironmentFault("sbatch is not here", "submit from a login node of the cluster")
    return [_try_job(config, planned) for planned in jobs]


def submit_jobs(config: RunConfig, jobs: list[Planned], *, chained: bool = True) -> list[Submitted]:
    """Queue all the jobs or none.

    Args:
        config: the run file.
        jobs: the jobs to queue.
        chained: whether each job waits for those before it.

    Raises:
        InputError: the folder for their logs cannot be written to.
        EnvironmentFault: Slurm does not accept a job.
    """
    executor = submitit.SlurmExecutor(_made_job_folder(config))
    submitted: list[Submitted] = []
    accepted = 0
    try:
        for planned in jobs:
            # The jobs of an array are ARRAY_0, ARRAY_1 and so on.
            earlier = [(job.stage, job.job_id.partition("_")[0]) for job in submitted]
            after = _dependency(earlier) if chained else None
            executor.python = task_python(planned.cluster.for_stage(planned.stage))
            # submitit keeps parameters from one submission to the next.
            executor.parameters.clear()
            folder = job_folder(config)
            parameters = job_parameters(planned.cluster, planned.stage, folder, after)
            executor.update_parameters(**parameters)
            submitted += _submit(executor, planned, planned.array)
            accepted += 1
    except BaseException as error:  # Ctrl-C too must leave nothing in the queue
        # An incomplete chain is useless, so its jobs are cancelled.
        for earlier in submitted:
            earlier.job.cancel(check=False)
        if not isinstance(error, FailedJobError | FailedSubmissionError):
            raise
        raise _not_accepted(error, jobs[accepted].stage, submitted) from None
    return submitted


def run_here(config: RunConfig, jobs: list[Planned]) -> list[Submitted]:
    """Run the jobs one after the other on this machine, without a time limit.

    Each job has as many tasks as on one node. The tasks stop when this process ends.

    Raises:
        InputError: a job requests several nodes, or the folder for the logs cannot be written to.
        EnvironmentFault: a job failed.
        Interrupted: a job was stopped; its state is saved.
    """
    # Check all jobs before the first one runs.
    for planned in jobs:
        nodes = planned.cluster.for_stage(planned.stage).nodes
        if nodes > 1:
            raise InputError(f"cluster.{planned.stage}.nodes is {nodes}; --local has one node")
    # The lines of `setup` run in bash, as in a batch file. submitit would use the system's shell,
    # which may not know `module`.
    setup = "\n".join([*setup_lines(config.cluster), 'exec "$@"'])
    python = shlex.join(["bash", "-c", setup, "bash", sys.executable])
    # submitit's processes outlive the process that starts them. Tell them which process to watch.
    os.environ[SUBMITTER] = str(os.getpid())
    executor = submitit.LocalExecutor(_made_job_folder(config), python=python)
    done: list[Submitted] = []
    for planned in jobs:
        asked = planned.cluster.for_stage(planned.stage)
        executor.update_parameters(
            tasks_per_node=asked.tasks, timeout_min=_YEAR_MINUTES, gpus_per_node=asked.gpus_per_node
        )
        # The workers of an array would share one machine, and `distill` needs none of them.
        (submitted,) = _submit(executor, planned, 1)
        done.append(submitted)
        _wait_here(submitted)
    return done


def _dependency(earlier: Sequence[tuple[ClusterStage, str]]) -> str | None:
    """Return what the next job of a chain waits for, as sbatch reads it.

    Args:
        earlier: stage and job id of each job before it.
    """
    conditions: dict[str, None] = {}
    for stage, job_id in reversed(earlier):
        if stage != "signals":
            conditions[f"afterok:{job_id}"] = None
            break
        conditions[f"after:{job_id}"] = None
    return ",".join(conditions) or None


def _submit(executor: submitit.Executor, planned: Planned, array: int) -> list[Submitted]:
    """Submit a job, or an array of equal jobs."""
    with writing(executor.folder), executor.batch():
        jobs = [executor.submit(planned.job) for _ in range(array)]
    return [Submitted(planned.stage, job.job_id, job.paths.stdout, job) for job in jobs]


def _not_accepted(
    error: FailedJobError | FailedSubmissionError,
    stage: ClusterStage,
    cancelled: Sequence[Submitted],
) -> EnvironmentFault:
    """Say what became of a chain of jobs, one of which sbatch has not accepted.

    Args:
        error: the error of submitit.
        stage: stage of the job.
        cancelled: the jobs before it, which are cancelled.
    """
    message = f"Slurm does not take the job for {stage}: {error}"
    hints = []
    # sbatch has ended well, or has not got an answer in time: the job may be queued all the same.
    if isinstance(error, FailedSubmissionError):
        message = f"the number of the job for {stage} is unknown: {first_line(error)}"
    if isinstance(error, FailedSubmissionError) or "timed out" in str(error):
        squeue = command_line("squeue", "--me", f"--name={job_name(stage)}")
        hints.append(f"the job may be in the queue: see `{squeue}`, and cancel it with scancel")
    if cancelled:
        numbers = ", ".join(earlier.job_id for earlier in cancelled)
        hints.append(f"the jobs before it are cancelled: {numbers}")
    return EnvironmentFault(message, "; ".join(hints) or "nothing is left in the queue")


def _try_job(config: RunConfig, planned: Planned) -> str:
    """Ask Slurm about one job, and return its answer."""
    folder = job_folder(config)
    parameters = job_parameters(planned.cluster, planned.stage, folder)
    text = job_text("true", str(folder), parameters, planned.array)
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
    # A controller that does not answer is not an error of the run file.
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
        EnvironmentFault: the job failed.
        Interrupted: the job was stopped; its state is saved.
    """
    job = submitted.job
    job.wait()
    # A killed task leaves no result file. submitit reports that as an exception.
    codes = [EnvironmentFault.exit_code]
    if job.exception() is None:
        codes = job.results()
    if codes[0] == Interrupted.exit_code:
        raise Interrupted(
            f"{submitted.stage} was stopped", "the same command resumes from its last checkpoint"
        )
    if any(codes):
        raise EnvironmentFault(f"{submitted.stage} failed", f"its log: {job.paths.stderr}")
