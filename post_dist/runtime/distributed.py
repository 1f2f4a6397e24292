"""The ranks of a run: this process among them, the collectives that stages need, and the start.

Shapes: W ranks.
"""

import logging
import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from post_dist.errors import EnvironmentFault, InputError, Interrupted, PostDistError
from post_dist.extras import op_cache
from post_dist.runtime.launcher import ENVIRONMENT_OF_ONE_PROCESS, find_launcher
from post_dist.runtime.rendezvous import wait_for_ranks
from post_dist.runtime.stop import saving
from post_dist.runtime.watchdog import phase, unwatched

log = logging.getLogger(__name__)

_TIMEOUT = timedelta(days=2)
"""Time limit of a collective.

Rank 0 may tune alone for many hours while the others wait. The watchdog ends a hang much sooner.
"""

Shared = TypeVar("Shared")

_working_on_main: ContextVar["World | None"] = ContextVar("working_on_main", default=None)
"""The ranks of which rank 0 is doing work alone."""


@dataclass(frozen=True)
class World:
    """The ranks of a run, as one of its processes sees them.

    Attributes:
        rank: number of this process among all, from 0.
        size: number of ranks W.
        local_rank: number of this process on its machine, from 0.
        launcher: the launcher that started the processes.
        device: the device that this process computes on.
    """

    rank: int
    size: int
    local_rank: int
    launcher: str
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files and the log."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._refuse_collective_on_main()
        if self.size > 1:
            dist.barrier()

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Average a tensor over ranks, in place."""
        self._refuse_collective_on_main()
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def concatenate(self, rows: torch.Tensor) -> torch.Tensor:
        """Concatenate the rows of all ranks in rank order. Ranks may differ in number of rows."""
        self._refuse_collective_on_main()
        if self.size == 1:
            return rows
        counts = [torch.empty(1, dtype=torch.long, device=self.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=self.device))

        # all_gather needs tensors of one shape, so every rank pads its rows to the largest number.
        largest = int(torch.cat(counts).max())
        padded = rows.new_zeros(largest, *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded)
        return torch.cat([part[: int(count)] for part, count in zip(gathered, counts, strict=True)])

    def ranks_of_a_node(self) -> int:
        """Return the number of ranks on a node. All ranks call it together.

        Raises:
            InputError: nodes differ in their number of ranks, or the ranks are not numbered node by
                node.
        """
        own = torch.tensor([self.local_rank], device=self.device)
        local_ranks = self.concatenate(own).tolist()
        count: int = max(local_ranks) + 1
        # Ranks with consecutive numbers share a model, so those of a node must be consecutive.
        if local_ranks != [rank % count for rank in range(self.size)]:
            raise InputError(
                "the nodes have different numbers of ranks, "
                "or the ranks are not numbered node by node",
                "engine.shard_group: node and bench fabric need equal nodes",
            )
        return count

    def lost_a_rank(self, error: RuntimeError) -> bool:
        """Return whether an error comes from a collective that lost its connection.

        NCCL raises its own class of error. gloo names its source file in the message.
        """
        return self.size > 1 and (isinstance(error, dist.DistError) or "/gloo/" in str(error))

    def leave(self) -> None:
        """Wait for all ranks, then destroy the process group.

        If a process exits while gloo's threads still run, they sometimes abort it.
        """
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank. All ranks call it and get the same answer."""
        return bool(self._largest(int(flag)))

    def from_main(self, own: Shared) -> Shared:
        """Return rank 0's value on every rank. All ranks call it."""
        self._refuse_collective_on_main()
        if self.size == 1:
            return own
        # torch fills the list in place.
        shared = [own]
        dist.broadcast_object_list(shared, 0, device=self.device)
        return shared[0]

    def merged(self, own: dict[str, str]) -> dict[str, str]:
        """Return the entries of all ranks' dictionaries, in rank order. All ranks call it."""
        gathered = self.gather_objects(own)
        return {key: value for each in gathered for key, value in each.items()}

    def gather_objects(self, own: Shared) -> list[Shared]:
        """Return the value of each rank, in rank order. All ranks call it."""
        self._refuse_collective_on_main()
        if self.size == 1:
            return [own]
        # torch fills the list in place.
        gathered = [own] * self.size
        dist.all_gather_object(gathered, own)
        return gathered

    def together(self, work: Callable[[], Shared]) -> Shared:
        """Do each rank's own work. If it fails on one rank, all ranks raise an error.

        Otherwise the other ranks would wait in a later collective for a rank that has left.

        Raises:
            PostDistError: another rank failed. The error has that rank's exit code, which a
                launcher reports.
        """
        # A list, because a result may be None.
        results: list[Shared] = []
        failure = None
        try:
            results.append(work())
        except PostDistError as error:
            failure = error
        # Every rank reaches this collective, whether its work failed or not.
        code = self._largest(failure.exit_code if failure else 0)
        if code:
            raise failure or _error_of_another_rank(code)
        return results[0]

    def on_main(self, work: Callable[[], Shared]) -> Shared:
        """Do work on rank 0 and return its result on every rank. All ranks call it.

        The work holds no collective: the other ranks would take part in another one.

        The work may take hours. Rank 0 has its own watchdog. If that ends rank 0, the launcher ends
        the waiting ranks. NFS caches a failed lookup for about 30 s. Only rank 0 should therefore
        look for files that may not exist yet.

        Raises:
            PostDistError: the work failed on rank 0.
        """
        if self.is_main:
            return self.from_main(self.together(partial(self._work_on_main, work)))
        # Rank 0 may save its work after a request to stop, so this rank leaves when rank 0 does.
        with unwatched("waiting for rank 0"), saving():
            self.together(lambda: None)
        # The value of other ranks is ignored.
        return self.from_main(cast(Shared, None))

    def _work_on_main(self, work: Callable[[], Shared]) -> Shared:
        """Do work on rank 0, and refuse collectives meanwhile."""
        before = _working_on_main.set(self)
        try:
            return work()
        finally:
            _working_on_main.reset(before)

    def _refuse_collective_on_main(self) -> None:
        """Raise an error in work that rank 0 does alone. One rank is enough to find the mistake."""
        if _working_on_main.get() is self:
            raise RuntimeError("a collective in work that rank 0 does alone")

    def _largest(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        self._refuse_collective_on_main()
        if self.size == 1:
            return number
        shared = torch.tensor([number], device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)


def _error_of_another_rank(exit_code: int) -> PostDistError:
    if exit_code == Interrupted.exit_code:
        return Interrupted(
            "another rank was stopped", "the same command resumes from what that rank has saved"
        )
    # The class of the other rank's error is unknown here, but launchers only need its exit code.
    error = PostDistError("another rank failed", "its own error message says why")
    error.exit_code = exit_code
    return error


def start(seed: int, join_timeout_seconds: float = 600.0) -> World:
    """Join the other ranks and seed this process. Without a launcher it is the only rank.

    Args:
        seed: seed of this process.
        join_timeout_seconds: longest wait for the other ranks.

    Raises:
        EnvironmentFault: the launcher's variables are wrong (see `find_launcher`), there are more
            local ranks than GPUs, or a rank does not come.
    """
    launcher = find_launcher(os.environ)
    if launcher == "none":
        os.environ |= ENVIRONMENT_OF_ONE_PROCESS
    os.environ["TORCH_EXTENSIONS_DIR"] = str(op_cache())
    rank = int(os.environ["RANK"])
    size = int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    # Another library may have initialized the process group.
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, local_rank, launcher, _use_device(local_rank))
    # A process alone needs no group until it shards a model. The private stages never do.
    if size > 1:
        # torch would wait for a missing rank without saying which. Its own store, at the same port,
        # must begin before this one ends: they share a server, and some ranks may be there already.
        store = None
        if not dist.is_initialized():
            store = wait_for_ranks(rank, size, join_timeout_seconds)
        phase("starting DeepSpeed")
        prepare_deepspeed(world)
        del store
    torch.manual_seed(seed)
    log.info("rank %d of %d on %s (launcher: %s)", rank, size, world.device, launcher)
    return world


def single_process() -> World:
    """Return a world of this process alone. It reads no variables of a launcher."""
    return World(0, 1, 0, "none", _use_device(0))


def prepare_deepspeed(world: World) -> None:
    """Join DeepSpeed's process group, before a model is sharded. All ranks call it.

    The group of a process that is alone is in its memory and opens no port.
    """
    import deepspeed  # takes seconds

    # Only DeepSpeed's inference all-reduce uses this op. Without it a CPU run compiles nothing, and
    # no killed compiler can leave a lock that hangs every later start.
    if world.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    # DeepSpeed makes groups of its own, and torch more, without a time limit of theirs. NCCL's
    # default of 10 minutes would abort the process before the watchdog could say where it was.
    distributed_c10d.default_pg_timeout = _TIMEOUT
    distributed_c10d.default_pg_nccl_timeout = _TIMEOUT
    if world.size == 1 and not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed(backend, timeout=_TIMEOUT, verbose=False)


def _use_device(local_rank: int) -> torch.device:
    """Choose the device of this process.

    Raises:
        EnvironmentFault: there are fewer GPUs than local ranks.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise EnvironmentFault(
            f"LOCAL_RANK={local_rank}, but this machine has {count} GPUs",
            "start one process per GPU",
        )
    # Each process drives one GPU.
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
