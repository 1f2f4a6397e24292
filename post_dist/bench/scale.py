"""`post-dist bench scale`: time and memory of a training step on the ranks of a launcher.

Each workload is measured with the run file's batch (strong scaling), and with that batch times the
number of ranks (weak scaling).

Shapes: W ranks, S steps, P parts of a step, K collectives of a step.
"""

import json
import socket
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from post_dist.bench.collectives import COLLECTIVE_KINDS, CollectiveKind, CollectiveTimer
from post_dist.bench.timing import device_name, peak_memory_mib, seconds_of, wait_for, watch_memory
from post_dist.bench.workloads import (
    DistillWorkload,
    RequiredSections,
    TransferWorkload,
    Workload,
    WorkloadInputs,
    untrained_student,
)
from post_dist.config.schema import RunConfig
from post_dist.files import make_folder, writing
from post_dist.models.load import load_tokenizer
from post_dist.models.sharded import load_sharded
from post_dist.planning.scaling import grown
from post_dist.runtime.distributed import World, prepare_deepspeed
from post_dist.runtime.precision import choose_precision

MEASURED_STEPS = 5
_WARM_UP_STEPS = 2
_STRAGGLER_RATIO = 1.15
"""A rank whose computation takes this many times the median rank's is reported as a straggler."""
_PARTS = ("compute", "wait", *COLLECTIVE_KINDS)
"""Parts of a step that are separated by its collectives. Reading the inputs is timed separately."""


def bench_scale(
    config: RunConfig, teacher_folder: Path, world: World, steps: int = MEASURED_STEPS
) -> dict[str, Any]:
    """Measure a step of distill and a step of transfer. All ranks call this function together.

    Ordinary steps are timed first. Then steps run with every collective awaited where it is called,
    which shows where each rank spends its time. These steps take longer if communication otherwise
    overlaps with computation.

    Args:
        config: the run file.
        teacher_folder: folder of the teacher.
        world: all ranks.
        steps: number of steps to measure; at least 2.

    Returns:
        The device, the ranks, the engine's settings, and `rows`, one for each stage and scaling:

        - `step_seconds`: median time of the slowest rank; `interval`: its interquartile range.
        - `tokens_per_second` or `samples_per_second`: rate of all ranks together.
        - `received_bytes`: bytes that this rank receives in a step, by kind of collective.
        - `straggler`: the rank that computes longer than the others, or None.
        - `per_rank`: seconds of `compute`, of `input`, of the collectives `gather`, `reduce` and
          `control`, and of `wait` (for other ranks). `peak_memory_gib` leaves out what the rank
          held before the models were loaded.

    Raises:
        InputError: a section is missing, or the folder `output` cannot be written to.
    """
    sections = RequiredSections.of_run(config)
    precision = choose_precision(config.engine, world.device)
    # The collectives are part of what is measured, also on one rank.
    prepare_deepspeed(world)
    # Report the host of a straggler, so that its node can be taken out of the cluster.
    hosts = world.gather_objects(socket.gethostname())
    # On one rank, strong and weak scaling are the same.
    batch_factors = {"strong": 1, "weak": world.size} if world.size > 1 else {"strong": 1}

    rows = []
    with untrained_student(config, sections, teacher_folder, world) as (student_folder, corpus):
        # The teacher stays loaded for all workloads, so its memory is measured once.
        held_mib = watch_memory(world.device)
        inputs = WorkloadInputs(
            sections=sections,
            teacher=load_sharded(teacher_folder, config.engine, precision, world),
            tokenizer=load_tokenizer(teacher_folder),
            student_folder=student_folder,
            corpus=corpus,
            precision=precision,
            world=world,
        )
        teacher_mib = watch_memory(world.device) - held_mib
        # One stage after the other, not in turns: DeepSpeed prefetches the parameters that the
        # previous pass used, and only the passes of transfer use the teacher's head.
        for workload_class in (DistillWorkload, TransferWorkload):
            for scaling, factor in batch_factors.items():
                without_models_mib = watch_memory(world.device) - teacher_mib
                workload = workload_class(grown(config, factor), inputs)
                row = _measure(workload, without_models_mib, hosts, steps, world)
                rows.append({"scaling": scaling} | row)
                # Release this workload, so that the next one's memory does not include it.
                workload.close()
                del workload
    return {
        "device": device_name(world.device),
        "ranks": world.size,
        "hosts": len(set(hosts)),
        "precision": precision,
        "zero_stage": config.engine.zero_stage,
        "shard_group": config.engine.shard_group,
        "rows": rows,
    }


def write_scale(path: Path, measured: dict[str, Any]) -> None:
    """Write the result of `bench_scale` as JSON, for `post-dist report`."""
    make_folder(path.parent)
    with writing(path):
        path.write_text(json.dumps(measured, indent=1) + "\n")


@dataclass(frozen=True)
class _StepSplit:
    """The time of one step by its parts.

    Attributes:
        seconds_WP: seconds of each part, in the order of `_PARTS`, on each rank.
        received_bytes: bytes that this rank received, by kind of collective.
    """

    seconds_WP: torch.Tensor
    received_bytes: dict[CollectiveKind, float]


def _measure(
    workload: Workload,
    without_models_mib: float,
    hosts: Sequence[str],
    steps: int,
    world: World,
) -> dict[str, Any]:
    """Measure a workload, and return its row (see `bench_scale`)."""
    # DeepSpeed traces the order of parameters in the first step and prefetches by it afterwards.
    for step in range(_WARM_UP_STEPS):
        workload.take_step(step)

    # Time and memory of ordinary steps. A step ends when its slowest rank ends.
    watch_memory(world.device)
    own_seconds_S = [_seconds(workload.take_step, step, world) for step in range(steps)]
    peak_mib = peak_memory_mib(world.device) - without_models_mib
    slowest_S = _from_all_ranks(own_seconds_S, world).amax(dim=0).tolist()
    lower_quartile, median, upper_quartile = statistics.quantiles(slowest_S, n=4)

    # Parts of the step come from separate steps, which await each collective.
    input_seconds = statistics.median(
        _seconds(workload.load_inputs, step, world) for step in range(steps)
    )
    splits = [_split_step(workload, step, input_seconds, world) for step in range(steps)]
    parts_WP = torch.stack([split.seconds_WP for split in splits]).median(dim=0).values
    input_and_memory_W2 = _from_all_ranks([input_seconds, peak_mib / 1024], world)

    # Every rank has all values now, so each builds the same rows and rank 0 prints them.
    per_rank = []
    for rank, host in enumerate(hosts):
        rank_input_seconds, rank_peak_gib = input_and_memory_W2[rank].tolist()
        row = {
            "rank": rank,
            "host": host,
            "peak_memory_gib": rank_peak_gib,
            "input": rank_input_seconds,
        }
        per_rank.append(row | dict(zip(_PARTS, parts_WP[rank].tolist(), strict=True)))
    return {
        "stage": workload.stage,
        "batch_size": workload.batch_size,
        "step_seconds": median,
        "interval": [lower_quartile, upper_quartile],
        f"{workload.unit}_per_second": workload.amount / median,
        "received_bytes": splits[-1].received_bytes,
        "straggler": _straggler(parts_WP, hosts),
        "per_rank": per_rank,
    }


def _straggler(parts_WP: torch.Tensor, hosts: Sequence[str]) -> str | None:
    """Return the rank and the host that compute much longer than the median rank, if any."""
    compute_W = parts_WP[:, _PARTS.index("compute")]
    slowest = int(compute_W.argmax())
    if float(compute_W[slowest]) <= _STRAGGLER_RATIO * float(compute_W.median()):
        return None
    return f"rank {slowest} on {hosts[slowest]}"


def _split_step(workload: Workload, step: int, input_seconds: float, world: World) -> _StepSplit:
    """Take a step with every collective awaited, and split its time into parts.

    The last rank to enter a collective does not wait for another rank. So the collective itself
    takes the shortest time over all ranks, and the rest of a rank's time in it is waiting.
    """
    with CollectiveTimer(world.device) as timer:
        seconds = _seconds(workload.take_step, step, world)

    # All ranks call the same collectives in the same order, so the K-th ones belong together.
    own_seconds_K = [collective.seconds for collective in timer.collectives]
    in_collectives_WK = _from_all_ranks(own_seconds_K, world)
    shortest_K = in_collectives_WK.amin(dim=0)
    outside_W = _from_all_ranks([seconds - input_seconds], world)[:, 0]
    compute_W = outside_W - in_collectives_WK.sum(dim=1)

    # A collective's shortest time counts for its kind, on all ranks alike.
    part_seconds = {
        # Timing noise makes a computation of almost no time negative.
        "compute": compute_W.clamp(min=0),
        "wait": (in_collectives_WK - shortest_K).sum(dim=1),
    }
    for kind in COLLECTIVE_KINDS:
        is_kind_K = torch.tensor(
            [collective.kind == kind for collective in timer.collectives], dtype=torch.float64
        )
        part_seconds[kind] = (shortest_K * is_kind_K).sum().expand(world.size)
    seconds_WP = torch.stack([part_seconds[part] for part in _PARTS], dim=1)
    return _StepSplit(seconds_WP, timer.received_bytes())


def _from_all_ranks(values: list[float], world: World) -> torch.Tensor:
    """Gather every rank's values [W, number of values]."""
    own = torch.tensor([values], dtype=torch.float64, device=world.device)
    return world.concatenate(own).cpu()


def _seconds(take: Callable[[int], object], step: int, world: World) -> float:
    """Return the time that this rank takes for a step that all ranks begin together."""
    # Without the barrier, a rank would wait in the first collective for those that start late.
    wait_for(world.device)
    world.barrier()
    return seconds_of(lambda: take(step), world.device)
