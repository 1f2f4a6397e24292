"""The command line: parse, load the run file, call a stage. Loads no torch before a stage is called."""

import json
import math
import os
import shutil
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from post_dist import __version__
from post_dist.config.assets import asset
from post_dist.config.load import load_run
from post_dist.config.schema import Stage
from post_dist.errors import ArtefactRefused, EnvironmentFault, InputError, Interrupted, PostDistError, PrivacyRefused
from post_dist.options import AsJson, Bench, Output, Overrides, Resume, ResumeOption, RunFile, Submittable
from post_dist.runtime.stop import end_process, leave_quietly, listen
from post_dist.runtime.watchdog import rest, watch

if TYPE_CHECKING:
    from post_dist.artifacts.run_folder import RunFolder
    from post_dist.config.schema import RunConfig
    from post_dist.runtime.distributed import World

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Private soft-prompt transfer: distill, tune, transfer.")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Take the option that the deepspeed launcher puts before the sub-command; LOCAL_RANK says the same."""


@app.command()
def pipeline(
    run: RunFile, set_: Overrides = None, output: Output = None, resume: ResumeOption = Resume.auto, json_: AsJson = False
) -> None:
    """Run the three stages and the evaluation; what is finished is not run again."""
    _run("evaluate", frozenset(("distill", "tune", "transfer", "evaluate")), run, set_, output, resume, json_)


@app.command()
def distill(run: RunFile, set_: Overrides = None, output: Output = None, resume: ResumeOption = Resume.auto, json_: AsJson = False) -> None:
    """Provider: distil the large LLM into a student."""
    _run("distill", frozenset(("distill",)), run, set_, output, resume, json_)


@app.command()
def tune(run: RunFile, set_: Overrides = None, output: Output = None, resume: ResumeOption = Resume.auto, json_: AsJson = False) -> None:
    """Owner: tune a soft prompt on the student with the private data."""
    _run("tune", frozenset(("tune",)), run, set_, output, resume, json_)


@app.command()
def transfer(
    run: RunFile, set_: Overrides = None, output: Output = None, resume: ResumeOption = Resume.auto, json_: AsJson = False
) -> None:
    """Provider: carry the soft prompt to the large LLM with public text alone."""
    _run("transfer", frozenset(("transfer",)), run, set_, output, resume, json_)


@app.command()
def evaluate(
    run: RunFile, set_: Overrides = None, output: Output = None, resume: ResumeOption = Resume.auto, json_: AsJson = False
) -> None:
    """Compare zero-shot, the prompts and the baselines on one split."""
    _run("evaluate", frozenset(("evaluate",)), run, set_, output, resume, json_)


@app.command()
def submit(
    run: RunFile,
    command: Annotated[Submittable, typer.Argument(metavar="STAGE", help="A stage, or pipeline for a chain of jobs.")],
    set_: Overrides = None,
    output: Output = None,
    print_: Annotated[bool, typer.Option("--print", help="Show the batch files, and submit nothing.")] = False,
    test_only: Annotated[bool, typer.Option("--test-only", help="Ask Slurm when each job would start, and submit nothing.")] = False,
    local: Annotated[bool, typer.Option("--local", help="Run on this machine, in processes of submitit.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the jobs to their end.")] = False,
    json_: AsJson = False,
) -> None:
    """Start stages under Slurm, with what `cluster` in the run file asks for."""
    from post_dist.cluster.follow import follow
    from post_dist.cluster.submit import job_texts, planned_jobs, run_here, submit_jobs, try_jobs

    config = load_run(run, set_, output)
    options = tuple(f"--set={setting}" for setting in set_ or ()) + ((f"--output={output.resolve()}",) if output else ())
    jobs = planned_jobs(config, run, command, options)
    if print_:
        print("\n".join(job_texts(config, jobs)))
        return
    if local:
        submitted = run_here(config, jobs)
    else:
        answers = try_jobs(config, jobs)
        if test_only:
            print("\n".join(answers))
            return
        submitted = submit_jobs(config, jobs)
    told = [{"stage": job.stage, "job_id": job.job_id, "log": str(job.log)} for job in submitted]
    if json_:
        print(json.dumps({"jobs": told}))
    else:
        for job in submitted:
            print(f"{job.stage}: job {job.job_id}, log {job.log}")
    if wait and not local:
        follow(submitted, lambda line: print(line, file=sys.stderr, flush=True))


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where the runs are to be.")] = Path("runs"),
    build: Annotated[bool, typer.Option("--build", help="Also compile what DeepSpeed would compile inside a job.")] = False,
    json_: AsJson = False,
) -> None:
    """Look at this machine, and say what it lacks and what to do about it."""
    from post_dist.cluster.doctor import build_ops, examine

    built = build_ops() if build else []
    findings = examine(folder)
    well = all(finding.ok for finding in findings)
    if json_:
        print(json.dumps({"ok": well, "checks": [asdict(finding) for finding in findings], "built": built}))
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'BAD '} {finding.name}: {finding.found}{f'; {finding.cure}' if finding.cure else ''}")
    if not well:
        raise typer.Exit(EnvironmentFault.exit_code)


@app.command()
def init(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it; made if missing.")]) -> None:
    """Write the demo's run file and its fetching script, to start your own from."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("demo.yaml", "fetch_demo.py"):
            if (folder / name).exists():
                raise InputError(f"{folder / name} exists already", "give another folder")
        for name in ("demo.yaml", "fetch_demo.py"):
            shutil.copyfile(asset(f"examples/{name}"), folder / name)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
    print(f"python {folder / 'fetch_demo.py'}        fetches the demo's model and data")
    print(f"post-dist pipeline {folder / 'demo.yaml'}   runs it")


@app.command()
def privacy(run: RunFile, set_: Overrides = None, json_: AsJson = False) -> None:
    """Epsilon of the run file's plan, or the noise for its target; reads no data and no model."""
    from post_dist.privacy.accounting import account, private_plan

    plan = private_plan(load_run(run, set_, None))
    cost = account(plan)
    _print_figures(
        {
            "epsilon": cost.epsilon,
            "delta": plan.delta,
            "noise_multiplier": plan.noise_multiplier,
            "sampling_probability": plan.sampling_probability,
            "steps": plan.steps,
            "accountant": cost.accountant,
            "cross_checks": cost.cross_checks,
            "epsilon_at_delta": cost.epsilon_at,
            "true_positive_rate_at_1_percent_false": cost.true_positive_rate,
            "mean_trials": plan.mean_trials,
            "private": plan.private,
        },
        json_,
    )


@app.command()
def budget(
    ledger: Annotated[Path, typer.Argument(metavar="LEDGER", help="The ledger of a private data set.")],
    delta: Annotated[float | None, typer.Option(min=0, max=1, help="At which delta; default the least of the runs'.")] = None,
    json_: AsJson = False,
) -> None:
    """What a private data set has spent over all private runs: finished, stopped and thrown away."""
    from post_dist.privacy.ledger import budget_of

    _print_figures(budget_of(ledger, delta), json_)


@app.command()
def audit(run: RunFile, set_: Overrides = None, json_: AsJson = False) -> None:
    """An empirical lower bound on epsilon from canaries in the real training step, beside the claim; reads no data and no model."""
    from post_dist.privacy.audit import audit as audit_plan

    result = audit_plan(load_run(run, set_, None))
    _print_figures(result, json_)
    if result["epsilon_lower_bound"] > result["epsilon_claimed"]:
        raise PrivacyRefused("the canaries show more than the plan claims", "do not use prompts made with this installation")


@app.command(name="plan")
def plan_run(
    run: RunFile,
    nodes: Annotated[int, typer.Option(min=1, help="How many nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of each.")] = 8,
    gpu: Annotated[str, typer.Option(help="Which GPU, by its name in the hardware file.")] = "h100",
    hardware: Annotated[Path | None, typer.Option(help="A hardware file whose entries come before ours.")] = None,
    sweep: Annotated[str | None, typer.Option(metavar="N,N,...", help="Also reckon these numbers of GPUs, and draw them.")] = None,
    set_: Overrides = None,
    output: Output = None,
    json_: AsJson = False,
) -> None:
    """What the run takes on a cluster: memory, bytes, time, scaling and conflicts; needs no GPU and no weights."""
    config = load_run(run, set_, output)
    from post_dist.models.load import config_folder
    from post_dist.planning.hardware import read_hardware
    from post_dist.planning.plan import Machine, goodput, nearest_that_fits, plan
    from post_dist.planning.sizes import size_of
    from post_dist.planning.sweep import draw
    from post_dist.planning.sweep import sweep as sweep_over
    from post_dist.report import print_plan

    if config.teacher is None:
        raise InputError("plan needs the section `teacher`")
    machine = Machine(nodes, gpus_per_node, read_hardware(gpu, hardware))
    wanted = config.engine.precision
    precision = wanted if wanted != "auto" else ("bf16" if "bf16" in machine.hardware.teraflops else "fp32")
    teacher = size_of(config_folder(config.teacher))
    result = plan(config, teacher, machine, precision) | {"gpu": gpu}
    result["long_run"] = goodput(result["stages"][0])
    if sweep:
        result["sweep"] = sweep_over(config, teacher, machine, precision, _counts(sweep))
        result["figure"] = str(config.output / config.name / "plan.png")
        draw(result["sweep"], f"{config.name} on {gpu}", Path(result["figure"]))
    too_large = [stage["stage"] for stage in result["stages"] if stage["memory_total_gib"] > machine.hardware.memory_gib]
    if too_large:
        result["nearest_that_fits"] = nearest_that_fits(config, teacher, machine, precision)
    if json_:
        print(json.dumps(result))
    else:
        print_plan(result)
    if result["conflicts"]:
        raise typer.Exit(InputError.exit_code)


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise InputError(f"--sweep {text}: not numbers of GPUs", "write them as 8,64,512")
    return counts


@app.command()
def bench(
    stage: Annotated[Bench, typer.Argument(help="Which stage; or `fabric`, for what the machine reaches.")],
    run: Annotated[Path | None, typer.Argument(metavar="[RUN.yaml]", help="The run file; `fabric` needs none.")] = None,
    write: Annotated[Path | None, typer.Option(metavar="FILE", help="Of `fabric`: the hardware file to write, for `plan`.")] = None,
    set_: Overrides = None,
    json_: AsJson = False,
) -> None:
    """Time and memory of a stage's step beside its peers, on the same model and batch; or what the machine itself reaches."""
    if stage == Bench.fabric:
        _bench_fabric(write, json_)
        return
    if run is None:
        raise InputError(f"bench {stage} needs a run file", "`post-dist init DIR` writes one")
    config = load_run(run, set_, None)
    world = _start(config)
    from post_dist.bench.distill import bench_distill
    from post_dist.bench.transfer import bench_transfer
    from post_dist.bench.tune import bench_tune
    from post_dist.stages.pipeline import Pipeline

    stages = Pipeline(config, world, frozenset())
    if stage == Bench.tune:
        result = bench_tune(config, stages.student, world)
    elif stage == Bench.distill:
        result = bench_distill(config, stages.teacher, world)
    else:
        result = bench_transfer(config, stages.teacher, stages.student, world)
    _print_figures(result, json_)
    world.leave()


def _bench_fabric(write: Path | None, as_json: bool) -> None:
    from post_dist.config.schema import RunConfig

    world = _start(RunConfig(name="fabric"))
    from post_dist.bench.fabric import measure_fabric, write_hardware

    result = measure_fabric(world, int(os.environ.get("LOCAL_WORLD_SIZE") or world.size))
    if world.is_main:
        if write is not None:
            write_hardware(write, result)
        _print_figures(result, as_json)
    world.leave()


@app.command()
def verify(folder: Annotated[Path, typer.Argument(metavar="DIR", help="The artefact's folder.")], json_: AsJson = False) -> None:
    """Check an artefact: hashes, lineage, shapes, finite values, and epsilon computed again from its own figures."""
    from post_dist.verify import verify as check

    result = check(folder)
    _print_figures(result, json_)
    if not result["ok"]:
        raise typer.Exit(ArtefactRefused.exit_code)


def _print_figures(figures: dict[str, Any], as_json: bool) -> None:
    """One JSON object, or a line for each figure."""
    if as_json:
        print(json.dumps({name: None if value == math.inf else value for name, value in figures.items()}))
        return
    for name, value in figures.items():
        if isinstance(value, list):
            print(f"{name}:", *(f"  {entry}" for entry in value), sep="\n")
        else:
            print(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")


def _run(
    command: Stage, may_run: frozenset[Stage], run: Path, overrides: list[str] | None, output: Path | None, resume: Resume, as_json: bool
) -> None:
    """Load the run file, then torch, then run; rank 0 prints what came of it."""
    listen()
    config = load_run(run, overrides, output)
    world = _start(config)
    from post_dist.stages.pipeline import Pipeline  # imports DeepSpeed, for which `start` has prepared the environment

    stages = Pipeline(config, world, may_run, resume)
    whole = len(may_run) > 1
    try:
        made = stages.everything() if whole else getattr(stages, command)()
    except KeyboardInterrupt:
        raise Interrupted("interrupted", "the same command goes on from the last checkpoint") from None
    except Interrupted:  # all ranks have agreed on it
        world.leave()
        raise
    except RuntimeError as error:
        if not world.lost_a_rank(error):
            raise
        hint = "look at what that rank said; the same command goes on from the last checkpoint"
        raise EnvironmentFault("another rank has left, or cannot be reached", hint) from None
    if world.is_main:
        _print_result(made if isinstance(made, list) else [made], whole, as_json)
    world.leave()


def _start(config: "RunConfig") -> "World":
    """Load torch and join the other ranks."""
    # Waiting OpenMP threads give up their core instead of spinning on it: beside one other busy process on two cores,
    # spinning made a tuning step eighteen times slower (15 s against 0.8 s). libgomp reads this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from post_dist.runtime.distributed import start
    from post_dist.runtime.logs import speak

    speak(_rank())
    watch(_rank(), config.engine.hang_timeout_seconds)
    return start(config.seed)


def _print_result(folders: "list[RunFolder]", whole: bool, as_json: bool) -> None:
    from post_dist.report import print_table, read_table, write_report

    folder = folders[0]
    result: dict[str, Any] = {"stage": folder.stage, "artifact": str(folder.artifact)}
    if len(folders) > 1:
        result = {"stage": folder.stage, "artifacts": [str(folder.artifact) for folder in folders]}
    if folder.stage == "evaluate":
        result = read_table(folder)
        if whole:
            result["report"] = str(write_report(folder))
    if as_json:
        print(json.dumps(result))
    elif folder.stage == "evaluate":
        print_table(result)
        print(f"report: {result['report']}" if whole else f"table: {folder.artifact / 'table.json'}")
    else:
        print(*(folder.artifact for folder in folders), sep="\n")


def _rank() -> int:
    return int(os.environ.get("RANK") or 0)


def run_command() -> int:
    """Run the command line that `sys.argv` holds, and give its exit code; a PostDistError becomes one message."""
    try:
        app()
    except SystemExit as end:  # typer ends every command this way
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except PostDistError as error:
        leave_quietly()
        print(f"post-dist: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        # The message of an unforeseen error may quote private data, so only its kind and place are shown.
        print(f"post-dist: internal error: {type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__))}", file=sys.stderr)
        return 1
    finally:
        rest()
    return 0


def main() -> None:
    """Run the command line, and end the process with its exit code."""
    end_process(run_command())


if __name__ == "__main__":
    main()
