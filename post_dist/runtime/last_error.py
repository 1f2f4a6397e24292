"""Report the error that ends this process: as a message, and as an object for a script.

The main thread reports most errors. The threads that end a process which hangs, or which was asked
to stop, report theirs too.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from post_dist.errors import PostDistError


class _Script:
    """What `--json` asks for.

    Attributes:
        answer: prints an error as an object; None without `--json`.
    """

    answer: Callable[[Mapping[str, Any]], None] | None = None


def answer_errors(answer: Callable[[Mapping[str, Any]], None] | None) -> None:
    """Set what prints the errors of this process as objects; None to print messages alone."""
    _Script.answer = answer


def report_error(error: PostDistError) -> None:
    """Print an error on standard error, and as an object if a script wants one."""
    print(f"post-dist: {error}", file=sys.stderr, flush=True)
    answer_error(error.as_object())


def answer_error(fields: Mapping[str, Any]) -> None:
    """Print an error whose message is printed already, if a script wants an object.

    Args:
        fields: `error`, `hint` and `exit_code`.
    """
    if _Script.answer is not None:
        _Script.answer(fields)
