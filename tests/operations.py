"""Count the operations that a piece of work dispatches, as a GPU would see them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "nonzero")
"""Operations at which the host waits for a GPU: it reads a value, or the size of a result."""


class Operations(TorchDispatchMode):
    """Counts operations by name within its context."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def operations_of(work: Callable[[], object]) -> Counter[str]:
    """Return the number of operations of a piece of work, by name."""
    with Operations() as operations:
        work()
    return operations.counts


def reads_of(work: Callable[[], object]) -> int:
    """Return how often the host waits for a value in a piece of work."""
    counts = operations_of(work)
    return sum(counts[name] for name in READS)


def profiled_operations_of(work: Callable[[], object]) -> int:
    """Return the number of operations of a piece of work, with the fused ones of compiled code.

    A dispatch mode would turn the compiled code off. Fused operations show in a profile if
    `cpp.enable_kernel_profile` of torch's compiler was set when they were compiled.
    """
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        work()
    names = [event.name for event in recorded.events() if not event.cpu_children]
    return sum(name.startswith("aten::") or "cpp_fused" in name for name in names)
