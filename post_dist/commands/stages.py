"""The three stages, the evaluation, and all of them in a row."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_dist.commands.options import AsJson, Output, Overrides, Resume, ResumeOption, RunFile
from post_dist.commands.printing import print_wide
from post_dist.commands.ranks import start_ranks
from post_dist.config.load import load_run
from post_dist.config.schema import Stage
from post_dist.errors import EnvironmentFault, Interrupted
from post_dist.runtime.stop import listen

if TYPE_CHECKING:
    from post_dist.artifacts.run_folder import RunFolder


def pipeline(
    run: RunFile,
    set_: Overrides = None,
    output: Output = None,
    resume: ResumeOption = Resume.auto,
    json_: AsJson = False,
) -> None:
    """Run the three stages and the evaluation; what is finished is not run again."""
    _run(
        "evaluate",
        frozenset(("distill", "tune", "transfer", "evaluate")),
        run,
        set_,
        output,
        resume,
        json_,
    )


def distill(
    run: RunFile,
    set_: Overrides = None,
    output: Output = None,
    resume: ResumeOption = Resume.auto,
    json_: AsJson = False,
) -> None:
    """Provider: distil the large LLM into a student."""
    _run("distill", frozenset(("distill",)), run, set_, output, resume, json_)


def tune(
    run: RunFile,
    set_: Overrides = None,
    output: Output = None,
    resume: ResumeOption = Resume.auto,
    json_: AsJson = False,
) -> None:
    """Owner: tune a soft prompt on the student with the private data."""
    _run("tune", frozenset(("tune",)), run, set_, output, resume, json_)


def transfer(
    run: RunFile,
    set_: Overrides = None,
    output: Output = None,
    resume: ResumeOption = Resume.auto,
    json_: AsJson = False,
) -> None:
    """Provider: carry the soft prompt to the large LLM with public text alone."""
    _run("transfer", frozenset(("transfer",)), run, set_, output, resume, json_)


def evaluate(
    run: RunFile,
    set_: Overrides = None,
    output: Output = None,
    resume: ResumeOption = Resume.auto,
    json_: AsJson = False,
) -> None:
    """Compare zero-shot, the prompts and the baselines on one split."""
    _run("evaluate", frozenset(("evaluate",)), run, set_, output, resume, json_)


def _run(
    command: Stage,
    may_run: frozenset[Stage],
    run: Path,
    overrides: list[str] | None,
    output: Path | None,
    resume: Resume,
    as_json: bool,
) -> None:
    """Load the run file, then torch, then run; rank 0 prints what came of it."""
    listen()
    config = load_run(run, overrides, output)
    world = start_ranks(config)
    from post_dist.stages.pipeline import (
        Pipeline,  # imports DeepSpeed, for which `start` has prepared the environment
    )

    stages = Pipeline(config, world, may_run, resume)
    whole = len(may_run) > 1
    try:
        made = stages.everything() if whole else getattr(stages, command)()
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted", "the same command goes on from the last checkpoint"
        ) from None
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


def _print_result(folders: "list[RunFolder]", whole: bool, as_json: bool) -> None:
    from post_dist.report import read_table, shown_table, write_report

    folder = folders[0]
    result: dict[str, Any] = {"stage": folder.stage, "artifact": str(folder.artifact)}
    if len(folders) > 1:
        result = {"stage": folder.stage, "artifacts": [str(folder.artifact) for folder in folders]}
    if folder.stage == "evaluate":
        result = read_table(folder.path)
        if whole:
            result["report"] = str(write_report(folder.path))
    if as_json:
        print(json.dumps(result))
    elif folder.stage == "evaluate":
        print_wide(shown_table(result))
        print(
            f"report: {result['report']}" if whole else f"table: {folder.artifact / 'table.json'}"
        )
    else:
        print(*(folder.artifact for folder in folders), sep="\n")
