"""Turn the end of a command into an exit code, and its error into one message."""

import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from post_dist.errors import InputError, PostDistError
from post_dist.extras import missing_package
from post_dist.runtime.stop import leave_quietly
from post_dist.runtime.watchdog import rest


def exit_code_of(
    work: Callable[[], object], answer: Callable[[Mapping[str, Any]], None] | None = None
) -> int:
    """Run a command or a job, and return the exit code that its process should end with.

    A `PostDistError` becomes one message on standard error. The message of any other exception may
    quote private data. Only its type and its traceback are printed.

    Args:
        work: the command or the job.
        answer: prints an error as an object with `error`, `hint` and `exit_code`; None to leave it
            at standard error.

    Returns:
        0, the code of a `SystemExit`, the code of a `PostDistError`, or 1 for any other exception.
    """
    answer = answer or (lambda fields: None)
    try:
        work()
    except SystemExit as end:  # typer ends every command this way
        # typer has printed the message of a wrong option, and ends while it handles that error.
        message_of = getattr(end.__context__, "format_message", None)
        if message_of is not None:
            answer(InputError(message_of(), "`--help` lists the options").as_object())
        if isinstance(end.code, int):
            return end.code
        return int(end.code is not None)
    except PostDistError as error:
        # When one task has failed, Slurm signals the others. A signal must not replace the exit
        # code of this one.
        leave_quietly()
        print(f"post-dist: {error}", file=sys.stderr)
        answer(error.as_object())
        return error.exit_code
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        if isinstance(error, ModuleNotFoundError) and (fault := missing_package(error)):
            print(f"post-dist: {fault}", file=sys.stderr)
            # A missing extra is no bug, so it needs no traceback.
            answer(fault.as_object())
            return fault.exit_code
        place = "".join(traceback.format_tb(error.__traceback__))
        name = type(error).__name__
        print(f"post-dist: internal error: {name}\n{place}", file=sys.stderr)
        answer(PostDistError(f"internal error: {name}").as_object())
        return PostDistError.exit_code
    finally:
        rest()
    return 0
