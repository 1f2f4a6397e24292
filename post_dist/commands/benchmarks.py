"""Benchmarks: of a stage beside its peers, of a step on many ranks, and of the machine itself."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from post_dist.commands.options import AsJson, Output, Overrides, RunFile, counts
from post_dist.commands.printing import print_numbers
from post_dist.commands.ranks import start_ranks
from post_dist.config.load import load_run
from post_dist.config.schema import RunConfig
from post_dist.errors import InputError

bench = typer.Typer(
    no_args_is_help=True,
    help="Measure a stage beside its peers, its step on many ranks, or the machine itself.",
)


@bench.command()
def distill(run: RunFile, set_: Overrides = None, json_: AsJson = False) -> None:
    """Time and memory of a step of distillation beside the published distiller's, on the same models and batch."""
    _beside_peers("distill", run, set_, json_)


@bench.command()
def tune(run: RunFile, set_: Overrides = None, json_: AsJson = False) -> None:
    """Time and memory of a step of tuning beside its peers', private ones too, on the same model and batch."""
    _beside_peers("tune", run, set_, json_)


@bench.command()
def transfer(run: RunFile, set_: Overrides = None, json_: AsJson = False) -> None:
    """Time and memory of a step of the transfer beside the published loop's, on the same models and batch."""
    _beside_peers("transfer", run, set_, json_)


@bench.command()
def fabric(
    write: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The hardware file to write, for `plan --hardware`."),
    ] = None,
    json_: AsJson = False,
) -> None:
    """What the machine reaches: matrix products, memory, and collectives between the ranks of a launcher."""
    world = start_ranks(RunConfig(name="fabric"))
    from post_dist.bench.fabric import measure_fabric, write_hardware

    result = measure_fabric(world)
    if world.is_main:
        if write is not None:
            write_hardware(write, result)
        print_numbers(result, json_)
    world.leave()


@bench.command()
def scale(
    run: RunFile,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the figures as JSON, for `report`.")
    ] = None,
    submit: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Measure in jobs under Slurm, on so many nodes each."),
    ] = None,
    set_: Overrides = None,
    output: Output = None,
    json_: AsJson = False,
) -> None:
    """A step of distill and of transfer on the ranks of a launcher: where its time goes on each, and the bytes between them."""
    config = load_run(run, set_, output)
    if submit is not None:
        nodes = counts("--submit", submit)
        if len(set(nodes)) < len(nodes):
            raise InputError(
                f"--submit {submit}: a number stands twice", "each number of nodes is measured once"
            )
        if write is not None:
            raise InputError(
                "--write does not go with --submit",
                "each job has a file of its own, and the answer names it",
            )
        _submit_scale(config, run, nodes, set_ or [], json_)
        return
    world = start_ranks(config)
    from post_dist.bench.scale import bench_scale, write_scale
    from post_dist.stages.pipeline import Pipeline

    result = bench_scale(config, Pipeline(config, world, frozenset()).teacher, world)
    if world.is_main:
        if write is not None:
            write_scale(write, result)
        print_numbers(result, json_)
    world.leave()


def _submit_scale(
    config: RunConfig, run: Path, nodes: list[int], settings: list[str], as_json: bool
) -> None:
    """One job for each number of nodes, with what the run file's cluster asks for distill."""
    from post_dist.cluster.submit import scale_jobs, submit_jobs, try_jobs

    jobs, results = scale_jobs(config, run, nodes, settings)
    try_jobs(config, jobs)
    told = [
        {"nodes": count, "job_id": job.job_id, "log": str(job.log), "result": str(result)}
        for count, job, result in zip(
            nodes, submit_jobs(config, jobs, chained=False), results, strict=True
        )
    ]
    if as_json:
        print(json.dumps({"jobs": told}))
        return
    for job in told:
        print(
            f"{job['nodes']} nodes: job {job['job_id']}, log {job['log']}, result {job['result']}"
        )
    print("when they are done: post-dist report", *(job["result"] for job in told))


def _beside_peers(stage: str, run: Path, overrides: list[str] | None, as_json: bool) -> None:
    config = load_run(run, overrides, None)
    world = start_ranks(config)
    if world.size > 1:
        raise InputError(
            f"bench {stage} compares ways to run a step on one device",
            "start it without a launcher",
        )
    from post_dist.bench.distill import bench_distill
    from post_dist.bench.transfer import bench_transfer
    from post_dist.bench.tune import bench_tune
    from post_dist.stages.pipeline import Pipeline

    stages = Pipeline(config, world, frozenset())
    result: dict[str, Any]
    if stage == "tune":
        result = bench_tune(config, stages.student, world)
    elif stage == "distill":
        result = bench_distill(config, stages.teacher, world)
    else:
        result = bench_transfer(config, stages.teacher, stages.student, world)
    print_numbers(result, as_json)
    world.leave()
