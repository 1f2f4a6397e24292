"""The errors that a user can meet: each says what happened, what to do, and carries its exit code."""


class PostDistError(Exception):
    """What a user did, met or was refused.

    Args:
        message: what happened and where.
        hint: what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  {self.hint}" if self.hint else message


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
    """The step would let private data cross the wall."""

    exit_code = 5


class Interrupted(PostDistError):
    """The run was stopped from outside; the same command goes on from the last checkpoint."""

    exit_code = 6
