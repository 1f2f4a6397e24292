"""The `bench` commands: stages beside other implementations, steps on many ranks, the machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from post_dist.bench.start import BenchStage, bench_fabric, bench_scale_of, bench_stage
from post_dist.commands.options import AsJson, Output, Overrides, RunFile, counts
from post_dist.commands.printing import print_json, print_numbers
from post_dist.config.load import load_run
from post_dist.config.schema import RunConfig
from post_dist.errors import InputError, command_line
from post_dist.runtime.ranks import leave_ranks, this_rank

bench = typer.Typer(
    no_args_is_help=True,
    help="Compare a stage with other implementations, time many ranks, or measure the machine.",
)


@bench.command()
def distill(run: RunFile, set_: Overrides = None, json_: AsJson = False) -> None:
    """Compare time and memory of a distillation step with the published distiller's."""
    _beside_peers("distill", run, set_, json_)


@bench.command()
def tune(run: RunFile, set_: Overrides = None, json_: AsJson = False) -> None:
    """Compare time and memory of private and ordinary tuning steps."""
    _beside_peers("tune", run, set_, json_)


@bench.command()
def transfer(run: RunFile, set_: Overrides = None, json_: AsJson = False) -> None:
    """Compare time and memory of a transfer step with the published loop's."""
    _beside_peers("transfer", run, set_, json_)


@bench.command()
def fabric(
    write: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a hardware file, for `plan --hardware`."),
    ] = None,
    json_: AsJson = False,
) -> None:
    """Measure matrix products, memory copies and collectives on the ranks of a launcher."""
    _end_with(bench_fabric(write), json_)


@bench.command()
def scale(
    run: RunFile,
    write: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the measurement as JSON, for `report`."),
    ] = None,
    submit: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...", help="Measure in Slurm jobs, one for each number of nodes."
        ),
    ] = None,
    set_: Overrides = None,
    output: Output = None,
    json_: AsJson = False,
) -> None:
    """Time a step of distill and of transfer, and tell where each rank spends it."""
    config = load_run(run, set_, output)
    if submit is None:
        _end_with(bench_scale_of(config, write), json_)
        return
    # Two jobs on equal numbers of nodes would write the same file.
    nodes = counts("--submit", submit)
    if len(set(nodes)) < len(nodes):
        raise InputError(
            f"--submit {submit}: a number is given twice", "each number of nodes is measured once"
        )
    if write is not None:
        raise InputError(
            "--write does not go with --submit",
            "each job has a file of its own, and the answer names it",
        )
    jobs = _submit_scale(config, run, nodes, set_)
    if json_:
        print_json({"jobs": jobs})
    else:
        _print_jobs(jobs)


def _submit_scale(
    config: RunConfig, run: Path, nodes: list[int], overrides: list[str] | None
) -> list[dict[str, Any]]:
    """Submit one job for each number of nodes, with the resources that `cluster` gives distill."""
    from post_dist.cluster.job import RunSource
    from post_dist.cluster.submit import scale_jobs, submit_jobs, try_jobs

    # Ask Slurm about all jobs before the first is queued. The jobs do not wait for each other.
    jobs, results = scale_jobs(config, RunSource.of_command(run, overrides), nodes)
    try_jobs(config, jobs)
    submitted = submit_jobs(config, jobs, chained=False)
    answers: list[dict[str, Any]] = []
    for count, job, result in zip(nodes, submitted, results, strict=True):
        answer = {"nodes": count, "job_id": job.job_id, "log": job.log, "result": result}
        answers.append(answer)
    return answers


def _print_jobs(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        print(
            f"{job['nodes']} nodes: job {job['job_id']}, log {job['log']}, result {job['result']}"
        )
    command = command_line("post-dist", "report", *(job["result"] for job in jobs))
    print(f"when they are done: {command}")


def _beside_peers(stage: BenchStage, run: Path, overrides: list[str] | None, as_json: bool) -> None:
    _end_with(bench_stage(stage, load_run(run, overrides)), as_json)


def _end_with(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a measurement on rank 0, then take down the process group."""
    if this_rank() == 0:
        print_numbers(result, as_json)
    leave_ranks()
