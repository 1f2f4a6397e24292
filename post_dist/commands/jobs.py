"""The commands `submit`, for Slurm jobs, and `doctor`, for what this machine lacks."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from post_dist.commands.options import AsJson, Output, Overrides, RunFile, Submittable
from post_dist.commands.printing import print_json
from post_dist.config.load import load_run
from post_dist.config.schema import RunConfig
from post_dist.conflicts import Conflict, raise_conflicts
from post_dist.errors import EnvironmentFault, InputError
from post_dist.runtime.ranks import this_rank

if TYPE_CHECKING:
    from post_dist.cluster.doctor import Finding
    from post_dist.cluster.job import Command

# typer needs an enumeration. Jobs hold plain strings, because jobs are pickled.
_COMMANDS: "dict[Submittable, Command]" = {
    Submittable.corpus: "corpus",
    Submittable.signals: "signals",
    Submittable.distill: "distill",
    Submittable.warm_start: "warm_start",
    Submittable.tune: "tune",
    Submittable.transfer: "transfer",
    Submittable.evaluate: "evaluate",
    Submittable.pipeline: "pipeline",
}


def submit(  # noqa: PLR0913 - typer reads the options from parameters
    run: RunFile,
    command: Annotated[
        Submittable,
        typer.Argument(metavar="STAGE", help="A stage, or pipeline for a chain of jobs."),
    ],
    set_: Overrides = None,
    output: Output = None,
    print_: Annotated[
        bool, typer.Option("--print", help="Print the batch files, but submit nothing.")
    ] = False,
    test_only: Annotated[
        bool,
        typer.Option(
            "--test-only",
            help="Ask Slurm when each job would start, and run `check`, but submit nothing.",
        ),
    ] = False,
    local: Annotated[
        bool, typer.Option("--local", help="Run the jobs on this machine, without Slurm.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the jobs have ended.")] = False,
    json_: AsJson = False,
) -> None:
    """Run stages as Slurm jobs, with the resources of the run file's section `cluster`."""
    from post_dist.cluster.follow import follow
    from post_dist.cluster.job import RunSource
    from post_dist.cluster.submit import job_texts, planned_jobs, run_here, submit_jobs, try_jobs

    _check_at_most_one({"--print": print_, "--test-only": test_only, "--local": local})
    config = load_run(run, set_, output)
    # A job that would fail is refused here, before it waits in a queue.
    jobs = planned_jobs(config, RunSource.of_command(run, set_, output), _COMMANDS[command])
    stages = [planned.stage for planned in jobs]
    # --print and --test-only submit nothing. --local does not need Slurm.
    if print_:
        _print_answers(stages, "batch_file", job_texts(config, jobs), json_)
        return
    if local:
        submitted = run_here(config, jobs)
    else:
        try:
            answers = try_jobs(config, jobs)
        except EnvironmentFault as error:
            # --test-only and --local do not go together.
            if not test_only:
                error.hint += ", or use --local"
            raise
        if test_only:
            _check_stages(config, stages)
            _print_answers(stages, "answer", answers, json_)
            return
        submitted = submit_jobs(config, jobs)
    # Print the job ids now: with --wait, this command may run for hours.
    if json_:
        rows = [{"stage": job.stage, "job_id": job.job_id, "log": job.log} for job in submitted]
        print_json({"jobs": rows})
    else:
        for job in submitted:
            print(f"{job.stage}: job {job.job_id}, log {job.log}")
    if wait and not local:
        sys.stdout.flush()
        follow(submitted, lambda line: print(line, file=sys.stderr, flush=True))


def _check_at_most_one(options: dict[str, bool]) -> None:
    """Refuse options of which one would silently win, and run what another one says not to run."""
    given = [option for option, is_given in options.items() if is_given]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} do not go together", "give one of them")


def _check_stages(config: RunConfig, stages: Sequence[str]) -> None:
    """Check the stages of jobs as `post-dist check` does.

    Raises:
        InputError: a job would fail; the message lists every conflict.
    """
    from post_dist.stages.check.run import check_run  # loads torch

    report = check_run(config)
    # Another stage may be the other party's.
    others = {*report.stages, "signals"} - set(stages)
    found = [
        Conflict(f"{conflict.stage}: {conflict.message}", conflict.hint)
        for conflict in report.conflicts
        if conflict.stage not in others
    ]
    raise_conflicts("submit", found)


def doctor(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder for the runs.")] = Path(
        "runs"
    ),
    build: Annotated[
        bool,
        typer.Option("--build", help="First compile what DeepSpeed would compile inside a job."),
    ] = False,
    ranks: Annotated[
        bool,
        typer.Option(
            "--ranks",
            help="Under a launcher: check versions, clocks, shared folder and links of all ranks.",
        ),
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(help="With --ranks: compare the links with what `plan` assumes for this GPU."),
    ] = None,
    json_: AsJson = False,
) -> None:
    """List what this machine lacks for post_dist, and what to do about it."""
    from post_dist.cluster.doctor import build_ops, examine

    # Build first, so that the findings list the new ops.
    built = build_ops() if build else []
    findings = examine(folder)
    if ranks:
        findings += _findings_of_ranks(folder, gpu)
        # The findings are those of all ranks, so one of them prints.
        if this_rank():
            return
    all_well = all(finding.ok for finding in findings)
    if json_:
        checks = [asdict(finding) for finding in findings]
        print_json({"ok": all_well, "checks": checks, "built": built})
    else:
        for finding in findings:
            print(_line(finding))
    if not all_well:
        raise typer.Exit(EnvironmentFault.exit_code)


def _findings_of_ranks(folder: Path, gpu: str | None) -> "list[Finding]":
    """Join the ranks of the launcher and check them together."""
    from post_dist.cluster.rank_doctor import examine_ranks
    from post_dist.planning.hardware import read_hardware
    from post_dist.runtime.distributed import start

    planned = None if gpu is None else read_hardware(gpu, None)
    world = start(0)
    findings = examine_ranks(folder, world, planned)
    world.leave()
    return findings


def _print_answers(stages: Sequence[str], name: str, answers: Sequence[str], as_json: bool) -> None:
    """Print one text for each stage, as plain text or as one JSON object.

    Args:
        stages: the stage of each job.
        name: key of the texts in JSON. A `batch_file` is printed without its stage.
        answers: the text of each job.
        as_json: whether to print JSON.
    """
    jobs = []
    for stage, answer in zip(stages, answers, strict=True):
        jobs.append({"stage": stage, name: answer})
    if as_json:
        print_json({"jobs": jobs})
        return
    for job in jobs:
        if name == "batch_file":
            print(job[name])
        else:
            print(f"{job['stage']}: {job[name]}")


def _line(finding: "Finding") -> str:
    mark = "ok  " if finding.ok else "BAD "
    line = f"{mark} {finding.name}: {finding.found}"
    if finding.cure:
        line += f"; {finding.cure}"
    return line
