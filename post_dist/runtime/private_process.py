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
    # A core dump would hold the examples, and the key of the noise.
    _, hard_limit = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard_limit))
    before = os.umask(_OWNER_ONLY)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def offline() -> Iterator[None]:
    """Refuse every connection that Python code of this process tries to make.

    Libraries report usage or look for updates on their own. The refusal is a `ConnectionError`,
    which they handle as a network that is down. Code of a compiled library is not seen, and
    neither is another program.
    """
    if not _Hook.added:
        sys.addaudithook(_refuse_connections)
        _Hook.added = True
    before = _Hook.refuses
    _Hook.refuses = True
    try:
        yield
    finally:
        _Hook.refuses = before


def _refuse_connections(event: str, arguments: tuple[object, ...]) -> None:
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
