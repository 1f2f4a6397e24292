"""Say in one line why a folder from another party is refused, whatever is wrong with it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from post_dist.admission.private_folder import PREFIX
from post_dist.errors import ArtifactRefused, EnvironmentFault, PostDistError, printable

_LONGEST_MESSAGE = 500
_COPY = re.compile(rf"\S*{re.escape(PREFIX)}[^/\s]*/?")
"""The path of a quarantined copy in a message."""


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Name the folder in each refusal. Whatever a foreign file breaks is a refusal too."""
    try:
        yield
    except (EnvironmentFault, KeyboardInterrupt, SystemExit):
        raise
    except PostDistError as error:
        # The sender's folder is meant, and not its copy.
        message = _COPY.sub("", " ".join(error.args[0].split()))[:_LONGEST_MESSAGE]
        raise ArtifactRefused(f"{folder}: {printable(message)}", printable(error.hint)) from None
    except BaseException as error:  # a panic of a Rust library is no Exception
        raise ArtifactRefused(
            f"{folder} cannot be read ({type(error).__name__})", "get the artifact again"
        ) from None
