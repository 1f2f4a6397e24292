"""What collectives bring to a rank and how long each takes, seen by wrapping every one that it calls."""

import time
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from post_dist.bench.timing import wait_for

Kind = Literal["gather", "reduce", "control"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_CONTROL_BYTES = 64
"""An all-reduce of no more is an agreement between ranks, not a sum of gradients."""


@dataclass(frozen=True)
class Call:
    """One collective.

    Attributes:
        kind: a gathering of weights, a sum of gradients, or an agreement between ranks.
        received_bytes: what a ring brings to this rank.
        seconds: from its start to its end, waiting for the other ranks included.
    """

    kind: Kind
    received_bytes: float
    seconds: float


class CollectiveTimer(TorchDispatchMode):
    """While it is entered, each collective is waited for where it is called, so that its time is its own; none runs beside computation."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._device = device

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation; note it if ranks take part in it together."""
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        wait_for(self._device)
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        work = result[-1] if isinstance(result, tuple) else result
        dist.Work.unbox(work).wait()
        wait_for(self._device)
        self.calls.append(Call(*_received(func.__name__, args), time.perf_counter() - start))
        return result

    def bytes_of(self, kind: Kind) -> float:
        """What all calls of a kind brought."""
        return sum(call.received_bytes for call in self.calls if call.kind == kind)


def _received(name: str, args: tuple[Any, ...]) -> tuple[Kind, float]:
    """The kind of a collective, and the bytes that a ring brings to this rank (Patarasuk and Yuan 2009)."""
    if name.startswith("_allgather_base_"):
        return "gather", args[0].nbytes - args[1].nbytes
    if name.startswith("_reduce_scatter_base_"):
        return "reduce", args[1].nbytes - args[0].nbytes
    tensors = [
        tensor
        for part in args
        if isinstance(part, list)
        for tensor in part
        if isinstance(tensor, torch.Tensor)
    ]
    size = sum(tensor.nbytes for tensor in tensors)
    if name.startswith("allreduce_"):
        ranks = dist.ProcessGroup.unbox(args[1]).size()
        return "control" if size <= _CONTROL_BYTES else "reduce", 2 * (ranks - 1) / ranks * size
    return "control", size
