"""Settings of a process that reads private data: what it writes is for its owner alone.

It also makes no connection while the data are in memory.
"""

import errno
import logging
import os
import resource
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

_OWNER_ONLY = 0o077

# Python's audit events for a connection, a name lookup, and a datagram without a connection.
_CONNECTIONS = {"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"}
_LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}


class _Hook:
    """The audit hook of this process. A hook cannot be removed, so it is switched on and off."""

    added = False
    refuses = False


@contextmanager
def owner_only() -> Iterator[None]:
    """Create files that only the owner can read, and leave no core dump behind.

    New folders get mode 0700 and new files 0600, whatever the umask of the process is.
    """
    leave_no_core_dump()
    before = os.umask(_OWNER_ONLY)
    try:
        yield
    finally:
        os.umask(before)


def leave_no_core_dump() -> None:
    """Let this process leave no core dump. It would hold the examples, and the key of the noise."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard_limit))


def refuse_connections() -> None:
    """Refuse every connection that Python code of this process tries to make from now on.

    Whoever reads private data calls this, so that no command can forget it. Libraries report usage
    or look for updates on their own. The refusal is a `ConnectionError`, which they handle as a
    network that is down. Code of a compiled library is not seen, and neither is another program.
    """
    if not _Hook.added:
        sys.addaudithook(_refuse_connection)
        _Hook.added = True
    _Hook.refuses = True


@contextmanager
def forgetting_private_data() -> Iterator[None]:
    """Allow connections as before at the end, when private data that were read inside are gone."""
    before = _Hook.refuses
    try:
        yield
    finally:
        _Hook.refuses = before


def _refuse_connection(event: str, arguments: tuple[object, ...]) -> None:
    """Raise an error for the events of a connection to another machine."""
    if not _Hook.refuses or not event.startswith("socket."):
        return
    connects = event in _CONNECTIONS and getattr(arguments[0], "family", None) != socket.AF_UNIX
    if connects or event in _LOOKUPS:
        # The address could hold private data, so it is not shown.
        log.warning("a library tried to use the network (%s); refused", event)
        raise ConnectionRefusedError(
            errno.ECONNREFUSED, "post_dist makes no connection while private data are in memory"
        )
