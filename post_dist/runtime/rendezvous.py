"""Wait until all ranks have started, and name those that have not."""

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from post_dist.errors import EnvironmentFault
from post_dist.runtime.watchdog import unwatched


def wait_for_ranks(rank: int, size: int, limit_seconds: float) -> dist.Store:
    """Wait until all ranks have come to rank 0's store, by MASTER_ADDR and MASTER_PORT.

    Args:
        rank: number of this rank.
        size: number of ranks.
        limit_seconds: longest time to wait.

    Returns:
        The store. Its server ends with the last store of rank 0 at this port.

    Raises:
        EnvironmentFault: ranks have not come, or rank 0 cannot be reached.
    """
    deadline = time.monotonic() + limit_seconds
    # The store has its own time limit, which may be longer than the watchdog's.
    with unwatched("waiting for all ranks to start"):
        store = _reach_store(rank, size, limit_seconds)
        # torchrun's store outlives the ranks, and holds what those of an earlier start have said.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        keys = [f"started/{start}/{each}" for each in range(size)]
        try:
            store.set(keys[rank], socket.gethostname())
            left = max(deadline - time.monotonic(), 1.0)
            store.wait(keys, timedelta(seconds=left))
        except (dist.DistError, RuntimeError):
            missing = _missing(store, keys)
        else:
            return store
    raise EnvironmentFault(
        f"{missing} within {limit_seconds:g} s",
        "look at the logs of the other ranks, and at the network between the nodes",
    )


def _reach_store(rank: int, size: int, limit_seconds: float) -> dist.TCPStore:
    """Open the store on rank 0, or connect to it. torchrun has a store of its own."""
    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    is_host = rank == 0 and not of_torchrun
    try:
        # torch opens another store at the same port later, in this process.
        return dist.TCPStore(
            *place,
            world_size=size,
            is_master=is_host,
            timeout=timedelta(seconds=limit_seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (dist.DistError, RuntimeError) as error:
        if is_host:
            raise EnvironmentFault(
                f"rank 0 cannot listen on port {place[1]}: {error}", "set another MASTER_PORT"
            ) from None
    raise EnvironmentFault(
        f"rank {rank} of {size} has not reached rank 0 on {place[0]}:{place[1]} "
        f"within {limit_seconds:g} s",
        "look at the log of rank 0, and at the network between the nodes",
    )


def _missing(store: dist.Store, keys: list[str]) -> str:
    """Say which ranks have not come."""
    try:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
    except (dist.DistError, RuntimeError):
        # Rank 0 holds the store, and was ended.
        return "rank 0 has left before all ranks started"
    numbers = ", ".join(map(str, missing))
    if len(missing) == 1:
        return f"rank {numbers} of {len(keys)} has not started"
    return f"ranks {numbers} of {len(keys)} have not started"
