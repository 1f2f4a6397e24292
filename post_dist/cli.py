"""The command line: the list of commands, and their exit codes. It loads torch only for a stage."""

import os
import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from post_dist import __version__
from post_dist.commands.artifacts import report, sign, verify
from post_dist.commands.benchmarks import bench
from post_dist.commands.check import check
from post_dist.commands.init import init
from post_dist.commands.jobs import doctor, submit
from post_dist.commands.planning import plan
from post_dist.commands.predict import export, predict
from post_dist.commands.printing import expect_object, print_error, reserve_stdout
from post_dist.commands.privacy import audit, budget, privacy
from post_dist.commands.runs import clean, ls, status
from post_dist.commands.stages import (
    corpus,
    distill,
    evaluate,
    pipeline,
    signals,
    transfer,
    tune,
    warm_start,
)
from post_dist.runtime.last_error import answer_errors
from post_dist.runtime.launcher import keep_from_restarting
from post_dist.runtime.logs import silence_deepspeed
from post_dist.runtime.process import exit_code_of
from post_dist.runtime.ranks import this_rank
from post_dist.runtime.stop import end_process, leave_in_seconds

# `exit_code_of` handles exceptions. typer's own traceback would print local variables, which may
# hold private data.
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Private soft-prompt transfer: distill, tune, transfer.",
)
# In the order of `post-dist --help`.
_COMMANDS = (
    pipeline,
    corpus,
    signals,
    distill,
    warm_start,
    tune,
    transfer,
    evaluate,
    predict,
    export,
    submit,
    doctor,
    init,
    privacy,
    budget,
    audit,
    check,
    plan,
    verify,
    sign,
    report,
    ls,
    status,
    clean,
)
for command in _COMMANDS:
    app.command()(command)
app.add_typer(bench, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Accept the option that the deepspeed launcher inserts. LOCAL_RANK has the same value."""


def run_command() -> int:
    """Run the command line that `sys.argv` holds, and return its exit code."""
    expect_object()
    # Other ranks print their errors on standard error alone, as they do with results.
    wants_json = _asks_for_json() and this_rank() == 0
    answer_errors(print_error if wants_json else None)
    return exit_code_of(app)


def main() -> None:
    """Run the command line, and end the process with its exit code."""
    silence_deepspeed()
    leave_in_seconds()
    if isinstance(sys.stdout, TextIOWrapper):
        # A terminal that cannot show a character gets its number, and no error. Programs that read
        # a file or a pipe get UTF-8 in any locale.
        encoding = sys.stdout.encoding if sys.stdout.isatty() else "utf-8"
        sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
    if _asks_for_json():
        reserve_stdout()
    code = run_command()
    keep_from_restarting(code, os.environ)
    end_process(code)


def _asks_for_json() -> bool:
    """Return whether the command line has `--json`. An error in an option comes before its use."""
    return "--json" in sys.argv[1:]


if __name__ == "__main__":
    main()
