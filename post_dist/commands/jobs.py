"""Jobs under Slurm, and what this machine lacks for them."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from post_dist.commands.options import AsJson, Output, Overrides, RunFile, Submittable
from post_dist.config.load import load_run
from post_dist.errors import EnvironmentFault


def submit(
    run: RunFile,
    command: Annotated[
        Submittable,
        typer.Argument(metavar="STAGE", help="A stage, or pipeline for a chain of jobs."),
    ],
    set_: Overrides = None,
    output: Output = None,
    print_: Annotated[
        bool, typer.Option("--print", help="Show the batch files, and submit nothing.")
    ] = False,
    test_only: Annotated[
        bool,
        typer.Option(
            "--test-only", help="Ask Slurm when each job would start, and submit nothing."
        ),
    ] = False,
    local: Annotated[
        bool, typer.Option("--local", help="Run on this machine, in processes of submitit.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the jobs to their end.")] = False,
    json_: AsJson = False,
) -> None:
    """Start stages under Slurm, with what `cluster` in the run file asks for."""
    from post_dist.cluster.follow import follow
    from post_dist.cluster.submit import job_texts, planned_jobs, run_here, submit_jobs, try_jobs

    config = load_run(run, set_, output)
    options = tuple(f"--set={setting}" for setting in set_ or ()) + (
        (f"--output={output.resolve()}",) if output else ()
    )
    jobs = planned_jobs(config, run, command, options)
    stages = [planned.stage for planned in jobs]
    if print_:
        texts = zip(stages, job_texts(config, jobs), strict=True)
        _tell(
            [{"stage": stage, "batch_file": text} for stage, text in texts], "{batch_file}", json_
        )
        return
    if local:
        submitted = run_here(config, jobs)
    else:
        answers = zip(stages, try_jobs(config, jobs), strict=True)
        if test_only:
            _tell(
                [{"stage": stage, "answer": answer} for stage, answer in answers],
                "{stage}: {answer}",
                json_,
            )
            return
        submitted = submit_jobs(config, jobs)
    told = [{"stage": job.stage, "job_id": job.job_id, "log": str(job.log)} for job in submitted]
    _tell(told, "{stage}: job {job_id}, log {log}", json_)
    if wait and not local:
        follow(submitted, lambda line: print(line, file=sys.stderr, flush=True))


def doctor(
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Where the runs are to be.")
    ] = Path("runs"),
    build: Annotated[
        bool,
        typer.Option("--build", help="Also compile what DeepSpeed would compile inside a job."),
    ] = False,
    json_: AsJson = False,
) -> None:
    """Look at this machine, and say what it lacks and what to do about it."""
    from post_dist.cluster.doctor import build_ops, examine

    built = build_ops() if build else []
    findings = examine(folder)
    well = all(finding.ok for finding in findings)
    if json_:
        print(
            json.dumps(
                {"ok": well, "checks": [asdict(finding) for finding in findings], "built": built}
            )
        )
    else:
        for finding in findings:
            print(
                f"{'ok  ' if finding.ok else 'BAD '} {finding.name}: {finding.found}{f'; {finding.cure}' if finding.cure else ''}"
            )
    if not well:
        raise typer.Exit(EnvironmentFault.exit_code)


def _tell(jobs: list[dict[str, str]], words: str, as_json: bool) -> None:
    """One JSON object, or each job in words."""
    print(json.dumps({"jobs": jobs}) if as_json else "\n".join(words.format(**job) for job in jobs))
