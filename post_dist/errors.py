"""The errors that a user may see. Each one has a message, a hint and an exit code."""

import shlex


def printable(text: str, *, lines: bool = False) -> str:
    """Escape what a terminal would act on, or could not show: control characters, line breaks.

    Args:
        text: the text.
        lines: whether line breaks stay.
    """
    if lines:
        return "\n".join(map(printable, text.split("\n")))
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def command_line(*words: object) -> str:
    """Return a command for people to copy. A path with a space stays one word of the shell."""
    return printable(shlex.join(map(str, words)))


class PostDistError(Exception):
    """Base class of all errors that a user can fix.

    Args:
        message: what happened and where.
        hint: what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        """Return the message, with the hint indented on a line of its own.

        A message may name a file or a word of somebody else, so control characters are escaped.
        """
        message = super().__str__()
        if self.hint:
            message = f"{message}\n  {self.hint}"
        return printable(message, lines=True)

    def as_object(self) -> dict[str, str | int]:
        """Return the error as `--json` prints it."""
        message = super().__str__()
        return {"error": message, "hint": self.hint, "exit_code": self.exit_code}


class InputError(PostDistError):
    """A run file, an option or a data file is wrong."""

    exit_code = 2


class EnvironmentFault(PostDistError):
    """The machine, the launcher or an installed package does not allow the run."""

    exit_code = 3


class ArtifactRefused(PostDistError):
    """A model or prompt folder did not pass its checks."""

    exit_code = 4


class PrivacyRefused(PostDistError):
    """A privacy rule forbids the run: private data would leak, or a guarantee would not hold."""

    exit_code = 5


class Interrupted(PostDistError):
    """The run was stopped from outside. The same command resumes from the last checkpoint."""

    exit_code = 6


def first_line(error: Exception) -> str:
    """Return the first line of a library's error message, at most 200 characters."""
    text = str(error).strip()
    if not text:
        return type(error).__name__
    return text.splitlines()[0][:200]
