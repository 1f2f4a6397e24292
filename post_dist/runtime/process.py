"""Turn the end of a command into an exit code, and its error into one message."""

import sys
import traceback
from collections.abc import Callable

from post_dist.errors import PostDistError
from post_dist.extras import missing_package
from post_dist.runtime.stop import leave_quietly
from post_dist.runtime.watchdog import rest


def exit_code_of(work: Callable[[], object]) -> int:
    """Run a command or a job, and return the exit code that its process should end with.

    A `PostDistError` becomes one message on standard error. The message of any other exception may
    quote private data. Only its type and its traceback are printed.

    Returns:
        0, the code of a `SystemExit`, the code of a `PostDistError`, or 1 for any other exception.
    """
    try:
        work()
    except SystemExit as end:  # typer ends every command this way
        if isinstance(end.code, int):
            return end.code
        return int(end.code is not None)
    except PostDistError as error:
        # When one task has failed, Slurm signals the others. A signal must not replace the exit
        # code of this one.
        leave_quietly()
        print(f"post-dist: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (fault := missing_package(error)):
            print(f"post-dist: {fault}", file=sys.stderr)
            return fault.exit_code
        place = "".join(traceback.format_tb(error.__traceback__))
        print(f"post-dist: internal error: {type(error).__name__}\n{place}", file=sys.stderr)
        return 1
    finally:
        rest()
    return 0
