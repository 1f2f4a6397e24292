"""The command line: which commands there are, and how each of them ends. Loads no torch before a stage is called."""

import sys
import traceback
from typing import Annotated

import typer

from post_dist import __version__
from post_dist.commands.artifacts import init, report, verify
from post_dist.commands.benchmarks import bench
from post_dist.commands.check import check
from post_dist.commands.jobs import doctor, submit
from post_dist.commands.planning import plan
from post_dist.commands.privacy import audit, budget, privacy
from post_dist.commands.stages import distill, evaluate, pipeline, transfer, tune
from post_dist.errors import PostDistError
from post_dist.runtime.stop import end_process, leave_quietly
from post_dist.runtime.watchdog import rest

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Private soft-prompt transfer: distill, tune, transfer.",
)
for command in (
    pipeline,
    distill,
    tune,
    transfer,
    evaluate,
    submit,
    doctor,
    init,
    privacy,
    budget,
    audit,
    check,
    plan,
    verify,
    report,
):
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
    """Take the option that the deepspeed launcher puts before the sub-command; LOCAL_RANK says the same."""


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
        print(
            f"post-dist: internal error: {type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__))}",
            file=sys.stderr,
        )
        return 1
    finally:
        rest()
    return 0


def main() -> None:
    """Run the command line, and end the process with its exit code."""
    end_process(run_command())


if __name__ == "__main__":
    main()
