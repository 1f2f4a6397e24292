"""The commands for the three stages, the evaluation, and the whole pipeline."""

from typing import Any

from post_dist import api
from post_dist.api import EvaluationResult, PromptResult, StudentResult, TransferResult
from post_dist.commands.options import AsJson, Output, Overrides, Resume, ResumeOption, RunFile
from post_dist.commands.printing import print_json
from post_dist.report.tables import print_wide, terminal_table
from post_dist.runtime.ranks import leave_ranks, this_rank
from post_dist.runtime.stop import listen


def pipeline(
    run: RunFile,
    set_: Overrides = None,
    output: Output = None,
    resume: ResumeOption = Resume.auto,
    json_: AsJson = False,
) -> None:
    """Run the three stages and the evaluation. Finished stages are not run again."""
    listen()
    config = api.load_run(run, set_ or (), output)
    _end_with(api.pipeline(config, resume=resume.mode), json_)


def distill(
    run: RunFile,
    set_: Overrides = None,
    output: Output = None,
    resume: ResumeOption = Resume.auto,
    json_: AsJson = False,
) -> None:
    """Provider: distill the large LLM into a student."""
    listen()
    config = api.load_run(run, set_ or (), output)
    _end_with(api.distill(config, resume=resume.mode), json_)


def warm_start(
    run: RunFile,
    set_: Overrides = None,
    output: Output = None,
    resume: ResumeOption = Resume.auto,
    json_: AsJson = False,
) -> None:
    """Provider: tune a public prompt on the student, for private tuning to start from."""
    listen()
    config = api.load_run(run, set_ or (), output)
    _end_with(api.warm_start(config, resume=resume.mode), json_, "warm-start")


def tune(
    run: RunFile,
    set_: Overrides = None,
    output: Output = None,
    resume: ResumeOption = Resume.auto,
    json_: AsJson = False,
) -> None:
    """Owner: tune a soft prompt on the student with the private data."""
    listen()
    config = api.load_run(run, set_ or (), output)
    _end_with(api.tune(config, resume=resume.mode), json_)


def transfer(
    run: RunFile,
    set_: Overrides = None,
    output: Output = None,
    resume: ResumeOption = Resume.auto,
    json_: AsJson = False,
) -> None:
    """Provider: transfer the soft prompt to the large LLM with public text alone."""
    listen()
    config = api.load_run(run, set_ or (), output)
    _end_with(api.transfer(config, resume=resume.mode), json_)


def evaluate(
    run: RunFile,
    set_: Overrides = None,
    output: Output = None,
    resume: ResumeOption = Resume.auto,
    json_: AsJson = False,
) -> None:
    """Compare zero-shot, the prompts and the baselines on one split."""
    listen()
    config = api.load_run(run, set_ or (), output)
    _end_with(api.evaluate(config, resume=resume.mode), json_)


def _end_with(
    result: StudentResult | PromptResult | TransferResult | EvaluationResult,
    as_json: bool,
    stage: str = "tune",
) -> None:
    """Print the result on rank 0, then take down the process group.

    Args:
        result: the result.
        as_json: whether to print JSON.
        stage: the stage that made a prompt.
    """
    if this_rank() == 0:
        if as_json:
            print_json(_json_object(result, stage))
        elif isinstance(result, EvaluationResult):
            print_wide(terminal_table(result.table))
            print(result.place)
        else:
            print(result)
    leave_ranks()


def _json_object(
    result: StudentResult | PromptResult | TransferResult | EvaluationResult, stage: str
) -> dict[str, Any]:
    # Scripts rely on the names of these keys.
    if isinstance(result, EvaluationResult):
        table = dict(result.table)
        if result.report is not None:
            table["report"] = str(result.report)
        return table
    if isinstance(result, StudentResult):
        return {"stage": "distill", "artifact": str(result.artifact)}
    if isinstance(result, PromptResult):
        return {"stage": stage, "artifact": str(result.artifact)}
    # Prompts of several owners come in the order of `inputs.source_prompt`.
    artifacts = [str(prompt.artifact) for prompt in result.prompts]
    if len(artifacts) == 1:
        return {"stage": "transfer", "artifact": artifacts[0]}
    return {"stage": "transfer", "artifacts": artifacts}
