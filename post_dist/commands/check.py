"""The command that checks a run file before anything starts."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from post_dist.commands.options import AsJson, Overrides, RunFile
from post_dist.commands.printing import print_json
from post_dist.config.load import load_run
from post_dist.errors import InputError, printable

if TYPE_CHECKING:
    from post_dist.stages.check.report import CheckReport, StageConflict

_ITEM = "  - "
"""The start of each error's line in the message of `load_run`."""


def check(run: RunFile, set_: Overrides = None, json_: AsJson = False) -> None:
    """Check a run file with its models, data and prompts; needs no weights and no GPU."""
    # Errors of the run file are reported in the same form as conflicts.
    try:
        config = load_run(run, set_, None)
    except InputError as error:
        report = _unreadable(error)
    else:
        from post_dist.stages.check.run import check_run  # loads torch

        report = check_run(config)
    if json_:
        print_json(_as_json(report))
    else:
        print(*(printable(line, lines=True) for line in _lines(report)), sep="\n")
    if not report.ok:
        raise typer.Exit(InputError.exit_code)


def _unreadable(error: InputError) -> "CheckReport":
    """Report the errors of a run file that cannot be loaded, one conflict for each error."""
    from post_dist.stages.check.report import CheckReport, StageConflict

    # The first line names the file. Each other line names a field.
    message = str(error.args[0])
    head, *items = message.split(f"\n{_ITEM}")
    messages = items or [head]
    conflicts = tuple(StageConflict("run file", each, error.hint) for each in messages)
    not_checked = "models, data and prompts: the run file has errors"
    return CheckReport((), conflicts, {}, (), (not_checked,))


def _as_json(report: "CheckReport") -> dict[str, Any]:
    """Return the report as one JSON object."""
    return {
        "ok": report.ok,
        "conflicts": [asdict(conflict) for conflict in report.conflicts],
        "label_words": report.label_words,
        "epsilon": [asdict(plan) for plan in report.epsilon],
        "stages": list(report.stages),
        "not_checked": list(report.not_checked),
    }


def _lines(report: "CheckReport") -> list[str]:
    """Write the report as lines for a terminal."""
    lines = []
    for conflict in report.conflicts:
        lines += _conflict_lines(conflict)
    for model, classes in report.label_words.items():
        lines.append(f"label words of the {model}'s tokenizer:")
        for label, words in classes.items():
            # A token may hold anything, such as a line that looks like one of this report.
            tokens = ", ".join(f"{word} -> {printable(token)}" for word, token in words.items())
            lines.append(f"  {label}: {tokens}")
    for plan in report.epsilon:
        lines.append(
            f"epsilon {plan.epsilon:.3f} at delta {plan.delta:.3g} "
            f"(noise multiplier {plan.noise_multiplier:g})"
        )
    lines += [f"not checked: {reason}" for reason in report.not_checked]
    lines.append(_verdict(report))
    return lines


def _conflict_lines(conflict: "StageConflict") -> list[str]:
    lines = [f"CONFLICT {conflict.stage}: {conflict.message}"]
    if conflict.hint:
        lines.append(f"  {conflict.hint}")
    return lines


def _verdict(report: "CheckReport") -> str:
    count = len(report.conflicts)
    if count:
        return "1 conflict" if count == 1 else f"{count} conflicts"
    return f"no conflicts: {', '.join(report.stages)}"
