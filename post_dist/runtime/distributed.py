"""The processes of a run: which launcher started them, who they are, and the few collectives that stages need."""

import logging
import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from post_dist.errors import EnvironmentFault, InputError, Interrupted, PostDistError
from post_dist.runtime.watchdog import unwatched

log = logging.getLogger(__name__)

_TIMEOUT = timedelta(days=2)
"""How long a collective waits: rank 0 may tune alone for many hours. The watchdog ends a hang long before."""
Shared = TypeVar("Shared")
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, its place on its machine, and the device that it computes on."""

    rank: int
    size: int
    local_rank: int
    launcher: str
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def concatenate(self, rows: torch.Tensor) -> torch.Tensor:
        """All ranks' rows in rank order; each rank may give its own number of them."""
        if self.size == 1:
            return rows
        counts = [torch.empty(1, dtype=torch.long, device=self.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=self.device))
        padded = rows.new_zeros(int(torch.cat(counts).max()), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded)
        return torch.cat([part[: int(count)] for part, count in zip(gathered, counts, strict=True)])

    def ranks_of_a_node(self) -> int:
        """How many ranks a node has; all ranks call it.

        Raises:
            InputError: the nodes differ in it, or the ranks are not numbered node by node.
        """
        local_ranks = self.concatenate(torch.tensor([self.local_rank], device=self.device)).tolist()
        count: int = max(local_ranks) + 1
        if local_ranks != [rank % count for rank in range(self.size)]:
            raise InputError(
                "the nodes have different numbers of ranks, or these are not numbered node by node",
                "engine.shard_group: node and bench fabric need equal nodes",
            )
        return count

    def lost_a_rank(self, error: RuntimeError) -> bool:
        """Whether an error is a collective's that lost its connection: NCCL has a class for it, gloo names its source file."""
        return self.size > 1 and (isinstance(error, dist.DistError) or "/gloo/" in str(error))

    def leave(self) -> None:
        """Take the process group down with all ranks there: gloo's threads, met by the end of a process, abort it now and then."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank; the same answer on all."""
        return bool(self._most(int(flag)))

    def from_main(self, own: Shared) -> Shared:
        """What rank 0 gives, on every rank."""
        if self.size == 1:
            return own
        shared = [own]
        dist.broadcast_object_list(shared, 0, device=self.device)
        return shared[0]

    def together(self, work: Callable[[], Shared]) -> Shared:
        """What each rank's own work gives; when it fails on one, all raise, and nobody waits for a rank that has left.

        Raises:
            PostDistError: another rank failed; with its exit code, for that is what a launcher reports.
        """
        given: list[Shared] = []
        failure = None
        try:
            given.append(work())
        except PostDistError as error:
            failure = error
        code = self._most(failure.exit_code if failure else 0)
        if code:
            raise failure or _of_another_rank(code)
        return given[0]

    def on_main(self, work: Callable[[], Shared]) -> Shared:
        """What rank 0's work gives, on every rank; the others wait for it, or fail with it.

        It may take hours, and rank 0 has a watchdog of its own: when that ends it, the launcher ends those that wait.
        Whatever may not exist yet is looked for here: a file that a rank has missed, its node goes on missing for half a minute on NFS.
        """
        if self.is_main:
            return self.from_main(self.together(work))
        with unwatched("waiting for rank 0"):
            self.together(lambda: None)
        return self.from_main(cast(Shared, None))

    def _most(self, number: int) -> int:
        if self.size == 1:
            return number
        shared = torch.tensor([number], device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)


def _of_another_rank(exit_code: int) -> PostDistError:
    if exit_code == Interrupted.exit_code:
        return Interrupted(
            "another rank was stopped", "the same command goes on from what that rank has saved"
        )
    error = PostDistError("another rank could not go on", "what it says itself tells why")
    error.exit_code = exit_code
    return error


def find_launcher(environment: Mapping[str, str]) -> str:
    """Name what started this process.

    Raises:
        EnvironmentFault: the launcher's variables are incomplete or contradict each other.
    """
    given = [name for name in _TORCHRUN if environment.get(name)]
    slurm_tasks = int(environment.get("SLURM_NTASKS") or 1)
    in_slurm_step = bool(environment.get("SLURM_PROCID"))
    if not given or given == ["MASTER_ADDR"]:
        if in_slurm_step and slurm_tasks > 1:
            raise EnvironmentFault(
                f"Slurm started {slurm_tasks} tasks, but RANK and WORLD_SIZE are not set: each would think it is alone",
                "set RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID MASTER_ADDR MASTER_PORT in each task",
            )
        return "none"
    missing = sorted(set(_TORCHRUN) - set(given))
    if missing:
        raise EnvironmentFault(
            f"{', '.join(given)} set, but not {', '.join(missing)}", "set all of them or none"
        )
    try:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        int(environment["LOCAL_RANK"])
    except ValueError:
        raise EnvironmentFault("RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers") from None
    if not 0 <= rank < size:
        raise EnvironmentFault(f"RANK={rank} does not lie within WORLD_SIZE={size}")
    if in_slurm_step and slurm_tasks > 1 and slurm_tasks != size:
        raise EnvironmentFault(
            f"WORLD_SIZE={size} contradicts SLURM_NTASKS={slurm_tasks}", "start one task per rank"
        )
    if environment.get("TORCHELASTIC_RUN_ID"):
        return "torchrun"
    return "srun" if in_slurm_step else "deepspeed or plain environment"


def start(seed: int) -> World:
    """Join the process group (a group of one when there is no launcher) and seed this process.

    Raises:
        EnvironmentFault: see `find_launcher`; or more local ranks than GPUs.
    """
    launcher = find_launcher(os.environ)
    if launcher == "none":
        os.environ |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": _free_port(),
        }
    # What DeepSpeed compiles belongs to one environment: in the home folder another one's build would be taken for it.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise EnvironmentFault(
                f"LOCAL_RANK={local_rank}, but this machine has {torch.cuda.device_count()} GPUs"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed  # reads the environment

        # Only DeepSpeed's inference all-reduce uses this op. Without it a CPU run compiles nothing, and no
        # killed compiler can leave a lock that hangs every later start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        import deepspeed

        deepspeed.init_distributed(
            "nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT, verbose=False
        )
    world = World(dist.get_rank(), dist.get_world_size(), local_rank, launcher, device)
    torch.manual_seed(seed)
    log.info("rank %d of %d on %s (launcher: %s)", world.rank, world.size, device, launcher)
    return world


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
