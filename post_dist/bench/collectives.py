"""Time and received bytes of each collective operation that a rank calls."""

import time
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from post_dist.bench.timing import wait_for

CollectiveKind = Literal["gather", "reduce", "control"]
"""All-gathers of weights, sums of gradients, and small agreements between ranks."""
COLLECTIVE_KINDS: tuple[CollectiveKind, ...] = get_args(CollectiveKind)

_CONTROL_BYTES = 64
"""An all-reduce of at most this size is an agreement between ranks, not a sum of gradients."""


@dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        kind: an all-gather of weights, a sum of gradients, or an agreement between ranks.
        received_bytes: bytes that this rank receives when the operation runs on a ring.
        seconds: time from its start to its end, waiting for other ranks included.
    """

    kind: CollectiveKind
    received_bytes: float
    seconds: float


class CollectiveTimer(TorchDispatchMode):
    """Record every collective that runs inside the context.

    Each collective is awaited where it is called. No communication is hidden behind computation, so
    each collective's time is its own and the whole step takes longer than usual.

    Args:
        device: device that the collectives use.

    Attributes:
        collectives: the operations in the order of their calls.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.collectives: list[Collective] = []
        self._device = device

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and record it if it is a collective."""
        kwargs = kwargs or {}
        # torch.distributed registers every collective as an operator of this namespace.
        if func.namespace != "c10d":
            return func(*args, **kwargs)

        # Computation that was queued before the collective is not part of its time.
        wait_for(self._device)
        start = time.perf_counter()
        result = func(*args, **kwargs)
        # Operations that return tensors return the handle to wait on as their last value.
        handle = result[-1] if isinstance(result, tuple) else result
        dist.Work.unbox(handle).wait()
        wait_for(self._device)
        seconds = time.perf_counter() - start

        kind, received_bytes = _kind_and_received_bytes(func.__name__, args)
        self.collectives.append(Collective(kind, received_bytes, seconds))
        return result

    def received_bytes(self) -> dict[CollectiveKind, float]:
        """Return the bytes that this rank received, by kind of collective."""
        total: dict[CollectiveKind, float] = dict.fromkeys(COLLECTIVE_KINDS, 0)
        for collective in self.collectives:
            total[collective.kind] += collective.received_bytes
        return total


def _kind_and_received_bytes(name: str, args: tuple[Any, ...]) -> tuple[CollectiveKind, float]:
    """Return the kind of a collective, and the bytes that a rank receives on a ring.

    The formulas are those of Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for
    clusters of workstations", 2009.
    """
    if name.startswith("_allgather_base_"):
        # A rank receives the parts of all other ranks.
        gathered = args[0]
        own = args[1]
        return "gather", gathered.nbytes - own.nbytes
    if name.startswith("_reduce_scatter_base_"):
        # A rank receives a partial sum of each part but the one that it keeps.
        kept = args[0]
        summed = args[1]
        return "reduce", summed.nbytes - kept.nbytes

    # The other operators get lists of tensors.
    size = _bytes_of_listed_tensors(args)
    if name.startswith("allreduce_"):
        # A ring runs a reduce-scatter, then an all-gather.
        ranks = dist.ProcessGroup.unbox(args[1]).size()
        kind: CollectiveKind = "control" if size <= _CONTROL_BYTES else "reduce"
        return kind, 2 * (ranks - 1) / ranks * size
    return "control", size


def _bytes_of_listed_tensors(args: tuple[Any, ...]) -> int:
    """Return the size of all tensors in those arguments that are lists."""
    size = 0
    for argument in args:
        if isinstance(argument, list):
            size += sum(each.nbytes for each in argument if isinstance(each, torch.Tensor))
    return size
