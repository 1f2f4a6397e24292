"""The commands for the three stages, the evaluation, and the whole pipeline."""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from post_dist import api
from post_dist.api import (
    EvaluationResult,
    PromptResult,
    PublicPromptResult,
    StudentResult,
    TransferResult,
)
from post_dist.commands.options import (
    AsJson,
    Epsilon,
    Minutes,
    Output,
    Overrides,
    Resume,
    ResumeOption,
    RunFile,
    TrustModel,
    with_epsilon,
    with_trust,
)
from post_dist.commands.printing import print_json
from post_dist.config.schema import RunConfig
from post_dist.errors import command_line
from post_dist.report.tables import print_wide, terminal_table
from post_dist.runtime.ranks import leave_ranks, this_rank
from post_dist.runtime.stop import listen

_Result = StudentResult | PublicPromptResult | PromptResult | TransferResult | EvaluationResult


def pipeline(
    run: RunFile,
    set_: Overrides = None,
    output: Output = None,
    resume: ResumeOption = Resume.auto,
    trust_model: TrustModel = False,
    json_: AsJson = False,
) -> None:
    """Run the three stages and the evaluation. Finished stages are not run again."""
    _run(api.pipeline, run, with_trust(set_, trust_model), output, resume, json_)


def corpus(
    run: RunFile, set_: Overrides = None, output: Output = None, json_: AsJson = False
) -> None:
    """Provider: tokenize the public text on CPUs. Without it, `distill` does the same first."""
    listen()
    result = api.tokenize_corpus(api.load_run(run, set_ or (), output))
    if json_:
        print_json(asdict(result))
    else:
        print(f"{result.path}: {result.tokens} tokens of {result.documents} documents")


def signals(
    run: RunFile, set_: Overrides = None, output: Output = None, json_: AsJson = False
) -> None:
    """Provider: write the teacher's signals for `distill`. Any number of workers may do so at once.

    Each worker is one process, or the ranks of one launcher.
    """
    listen()
    result = api.write_signals(api.load_run(run, set_ or (), output))
    if this_rank() == 0:
        if json_:
            print_json(asdict(result))
        else:
            print(f"{result.path}: {result.files} files of signals")
    leave_ranks()


def distill(
    run: RunFile,
    set_: Overrides = None,
    output: Output = None,
    resume: ResumeOption = Resume.auto,
    json_: AsJson = False,
) -> None:
    """Provider: distill the large LLM into a student."""
    _run(api.distill, run, set_, output, resume, json_)


def warm_start(
    run: RunFile,
    set_: Overrides = None,
    output: Output = None,
    resume: ResumeOption = Resume.auto,
    trust_model: TrustModel = False,
    json_: AsJson = False,
) -> None:
    """Provider: tune a public prompt on the student, for private tuning to start from."""
    _run(api.warm_start, run, with_trust(set_, trust_model), output, resume, json_)


def tune(  # noqa: PLR0913 - typer reads the options from parameters
    run: RunFile,
    set_: Overrides = None,
    output: Output = None,
    resume: ResumeOption = Resume.auto,
    epsilon: Epsilon = None,
    minutes: Minutes = None,
    trust_model: TrustModel = False,
    json_: AsJson = False,
) -> None:
    """Owner: tune a soft prompt on the student with the private data."""
    listen()
    given = with_trust(set_, trust_model)
    added = with_epsilon(None, epsilon)
    # The chosen settings are part of the run file from here on, so they are checked like it.
    if minutes is not None:
        chosen = api.settings_for_minutes(api.load_run(run, [*given, *added], output), minutes)
        added += chosen.overrides
    _run(api.tune, run, [*given, *added], output, resume, json_)
    if added and this_rank() == 0:
        # Without them, another command looks for a run that was never made.
        settings = " ".join(f"--set {each}" for each in added)
        print(f"give other commands the same settings: {settings}", file=sys.stderr)


def transfer(
    run: RunFile,
    set_: Overrides = None,
    output: Output = None,
    resume: ResumeOption = Resume.auto,
    trust_model: TrustModel = False,
    json_: AsJson = False,
) -> None:
    """Provider: transfer the soft prompt to the large LLM with public text alone."""
    _run(api.transfer, run, with_trust(set_, trust_model), output, resume, json_)


def evaluate(
    run: RunFile,
    set_: Overrides = None,
    output: Output = None,
    resume: ResumeOption = Resume.auto,
    trust_model: TrustModel = False,
    json_: AsJson = False,
) -> None:
    """Compare zero-shot, the prompts and the baselines on one split."""
    _run(api.evaluate, run, with_trust(set_, trust_model), output, resume, json_)


def _run(
    stage: Callable[..., _Result],
    run: Path,
    set_: list[str] | None,
    output: Path | None,
    resume: Resume,
    as_json: bool,
) -> None:
    """Run a function of the API, print its result on rank 0, and take down the process group."""
    listen()
    config = api.load_run(run, set_ or (), output)
    result = stage(config, resume=resume.mode)
    if this_rank() == 0:
        if as_json:
            print_json(_json_object(result))
        elif isinstance(result, EvaluationResult):
            # Others may read the log of a batch job. The page is for its owner alone.
            if "SLURM_JOB_ID" not in os.environ or sys.stdout.isatty():
                print_wide(terminal_table(result.table))
            print(result.place)
        else:
            # Standard error is not buffered, and what it gets must stand below.
            print(result, flush=True)
            command = _predict_command(config, result)
            if command is not None:
                print(f"label new texts with:\n{command}", file=sys.stderr)
    leave_ranks()


def _predict_command(config: RunConfig, result: _Result) -> str | None:
    """Return the command that labels new texts with a tuned prompt.

    Only `tune` is followed by one. `predict` reads one column, so a text of several has none.
    """
    if not isinstance(result, PromptResult) or result.student is None:
        return None
    task = config.need_task("private_task")
    column = task.text_columns[0]
    if task.text != f"{{{column}}}":
        return None
    prompt = _shortest(result.artifact)
    words = ["post-dist", "predict", prompt, "NEW.csv", "--model", _shortest(result.student)]
    return command_line(*words, "--column", column)


def _shortest(path: Path) -> str:
    """Return a path as it is, or from the working folder if that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


def _json_object(result: _Result) -> dict[str, Any]:
    # Scripts rely on the names of these keys.
    if isinstance(result, EvaluationResult):
        table = dict(result.table)
        if result.report is not None:
            table["report"] = result.report
        return table
    if isinstance(result, StudentResult):
        return {"stage": "distill", "artifact": result.artifact}
    if isinstance(result, PublicPromptResult):
        return {"stage": "warm-start", "artifact": result.artifact}
    if isinstance(result, PromptResult):
        return {"stage": "tune", "artifact": result.artifact}
    # Prompts of several owners come in the order of `inputs.source_prompt`.
    artifacts = [prompt.artifact for prompt in result.prompts]
    if len(artifacts) == 1:
        return {"stage": "transfer", "artifact": artifacts[0]}
    return {"stage": "transfer", "artifacts": artifacts}
