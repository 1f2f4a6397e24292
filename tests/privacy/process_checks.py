"""Checks of what a process with private data may do: connections, files and core dumps."""

import os
import resource
import socket
from collections.abc import Callable
from functools import partial
from unittest import mock

from privacy.checks import folder, part


def raises_connection_error(call: Callable[[], object]) -> bool:
    try:
        call()
    except ConnectionError:
        return True
    return False


def a_private_process_makes_no_connection() -> None:
    process = part("runtime.private_process")
    with socket.socket() as server, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = server.getsockname()
        calls = {
            "a connection": partial(socket.create_connection, address, 1),
            "a port": partial(socket.create_server, ("127.0.0.1", 0)),
            "a datagram": partial(datagrams.sendto, b"x", address),
            "a name lookup": partial(socket.getaddrinfo, "localhost", 80),
            "an old name lookup": partial(socket.gethostbyname, "localhost"),
        }
        for name, call in calls.items():
            assert not raises_connection_error(call), f"{name} is refused without private data"
            with process.forgetting_private_data():
                process.refuse_connections()
                assert raises_connection_error(call), f"{name} was made"
            assert not raises_connection_error(call), f"{name} is refused afterwards"
        # Processes of one machine may talk.
        with (
            process.forgetting_private_data(),
            folder() as place,
            socket.socket(socket.AF_UNIX) as local,
        ):
            process.refuse_connections()
            local.bind(str(place / "socket"))


def files_of_a_private_process_are_the_owner_s_alone() -> None:
    process = part("runtime.private_process")
    before = os.umask(0)
    _, hard_limit = resource.getrlimit(resource.RLIMIT_CORE)
    try:
        # The limit of this machine may be zero already.
        with mock.patch.object(process.resource, "setrlimit") as limits, process.owner_only():
            pass
        limits.assert_called_once_with(resource.RLIMIT_CORE, (0, hard_limit))
        with folder() as place, process.owner_only():
            (place / "file").write_text("x")
            (place / "folder").mkdir()
            assert (place / "file").stat().st_mode & 0o777 == 0o600
            assert (place / "folder").stat().st_mode & 0o777 == 0o700
            assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0
        assert os.umask(0) == 0, "the umask of before is not restored"
    finally:
        os.umask(before)


CHECKS: list[Callable[[], None]] = [
    a_private_process_makes_no_connection,
    files_of_a_private_process_are_the_owner_s_alone,
]
