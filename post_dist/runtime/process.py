"""Turn the end of a command into an exit code, and its error into one message."""

import errno
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from post_dist.errors import EnvironmentFault, InputError, PostDistError
from post_dist.extras import missing_package
from post_dist.runtime.last_error import answer_error, report_error
from post_dist.runtime.private_process import forgetting_private_data
from post_dist.runtime.stop import leave_quietly
from post_dist.runtime.watchdog import pause_watchdog

_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk."""


def exit_code_of(work: Callable[[], object]) -> int:
    """Run a command or a job, and return the exit code that its process should end with.

    A `PostDistError` becomes one message on standard error. The message of any other exception may
    quote private data. Only its type and its traceback are printed.

    Returns:
        0, the code of a `SystemExit`, the code of a `PostDistError`, or 1 for any other exception.
    """
    try:
        _need_temporary_folder()
        _work_and_flush(work)
    except SystemExit as end:  # typer ends every command this way
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code:
            answer_error(_fields_of(end) | {"exit_code": code})
        return code
    except PostDistError as error:
        # When one task has failed, Slurm signals the others. A signal must not replace the exit
        # code of this one.
        leave_quietly()
        report_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        if isinstance(error, ModuleNotFoundError) and (fault := missing_package(error)):
            # A missing extra is no bug, so it needs no traceback.
            report_error(fault)
            return fault.exit_code
        if isinstance(error, OSError) and error.errno in _FULL:
            # Files are written in `writing`, which names them. This was standard output.
            full = EnvironmentFault(
                "the output cannot be written: the disk is full",
                "free some space, and run it again",
            )
            report_error(full)
            return full.exit_code
        place = "".join(traceback.format_tb(error.__traceback__))
        name = type(error).__name__
        print(f"post-dist: internal error: {name}\n{place}", file=sys.stderr)
        answer_error(PostDistError(f"internal error: {name}").as_object())
        return PostDistError.exit_code
    finally:
        pause_watchdog()
    return 0


def _need_temporary_folder() -> None:
    """Refuse a machine without a folder for temporary files, which libraries need at their import.

    Raises:
        EnvironmentFault: there is none.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        raise EnvironmentFault(
            "there is no folder for temporary files that can be written to",
            "free some space in /tmp, or set TMPDIR to another folder",
        ) from None


def _work_and_flush(work: Callable[[], object]) -> None:
    """Run work, and write what it has printed, because an error in the end would be lost."""
    try:
        # A notebook or a test may go on in this process.
        with forgetting_private_data():
            work()
    finally:
        # Whoever reads no more, as `head` does, needs no error.
        with suppress(BrokenPipeError):
            sys.stdout.flush()


def _fields_of(end: SystemExit) -> dict[str, Any]:
    """Describe why typer ends a command that has failed. It has printed the message already."""
    # typer ends while it handles the error of a wrong option, or KeyboardInterrupt.
    message_of = getattr(end.__context__, "format_message", None)
    if message_of is None:
        return PostDistError("the command was stopped").as_object()
    return InputError(message_of(), "`--help` lists the options").as_object()
