"""Settings of a process that reads private data: what it writes is for its owner alone."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

_OWNER_ONLY = 0o077


@contextmanager
def owner_only() -> Iterator[None]:
    """Create files that only the owner can read, and leave no core dump behind.

    New folders get mode 0700 and new files 0600, whatever the umask of the process is.
    """
    # A core dump would hold the examples, and the key of the noise.
    _, hard_limit = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard_limit))
    before = os.umask(_OWNER_ONLY)
    try:
        yield
    finally:
        os.umask(before)
