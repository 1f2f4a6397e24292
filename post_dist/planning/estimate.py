"""The estimate of one stage, and its consequences: total memory, GPU-hours, whether it fits."""

from dataclasses import dataclass, field
from typing import Any

from post_dist.conflicts import Conflict
from post_dist.planning.hardware import Machine
from post_dist.planning.memory import GIB, fullest

_RESERVED_GIB = 2.0
"""Memory of a GPU for CUDA and NCCL, and what the allocator cannot use."""


@dataclass(frozen=True)
class StageEstimate:
    """What one stage of a run needs.

    Attributes:
        stage: name of the stage.
        ranks: number of GPUs that it runs on.
        hours: duration.
        memory_gib: memory of one GPU by part.
        numbers: all other numbers of the stage, by their names in the plan's JSON.
        conflicts: what keeps the stage from running.
        moments: for each moment of a step, the parts of memory that exist only then.
        host_bytes: bytes that one rank keeps in host memory.
    """

    stage: str
    ranks: int
    hours: float
    memory_gib: dict[str, float]
    numbers: dict[str, Any]
    conflicts: list[Conflict]
    moments: list[tuple[str, ...]] = field(default_factory=list)
    host_bytes: float = 0.0


@dataclass(frozen=True)
class PartEstimate:
    """What a part of a stage needs, after or before its other parts.

    Attributes:
        seconds: duration.
        memory_gib: memory of one GPU by part.
        numbers: numbers of a step, by their names in the plan's JSON.
    """

    seconds: float
    memory_gib: dict[str, float]
    numbers: dict[str, Any]


def stage_numbers(estimate: StageEstimate, machine: Machine) -> dict[str, Any]:
    """Return a stage as the plan prints it: with total memory, GPU-hours, and what does not fit."""
    # The fullest moment decides, not the sum of all parts.
    memory = estimate.memory_gib | {"reserved": _RESERVED_GIB}
    total = fullest(memory, estimate.moments)
    # All GPUs of a node offload into the same host memory.
    host = machine.gpus_per_node * estimate.host_bytes / GIB
    too_large = _memory_conflicts(memory, total, host, machine)
    conflicts = [*estimate.conflicts, *too_large]
    return estimate.numbers | {
        "stage": estimate.stage,
        "gpus": estimate.ranks,
        "memory_gib": memory,
        "memory_total_gib": total,
        "node_memory_gib": host or None,
        "fits": not too_large,
        "hours": estimate.hours,
        "gpu_hours": estimate.hours * estimate.ranks,
        "conflicts": [conflict.line for conflict in conflicts],
    }


def _memory_conflicts(
    memory: dict[str, float], total: float, host: float, machine: Machine
) -> list[Conflict]:
    """Compare the memory of a node and of a GPU with what the hardware has.

    Args:
        memory: GiB of one GPU by part.
        total: GiB at the fullest moment.
        host: GiB that one node offloads.
        machine: the nodes.
    """
    found = []
    of_node = machine.hardware.host.memory_gib
    if host > of_node:
        found.append(Conflict(f"{host:.1f} GiB are offloaded to a node of {of_node:g} GiB"))
    of_gpu = machine.hardware.memory_gib
    if total > of_gpu:
        largest = max(memory, key=lambda part: memory[part])
        found.append(
            Conflict(
                f"{total:.1f} GiB on a GPU of {of_gpu:g} GiB, "
                f"most of it {largest} ({memory[largest]:.1f})"
            )
        )
    return found
