"""What a step of each stage takes: memory by part, operations, bytes on the wires and seconds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from post_dist.config.precision import Precision
from post_dist.config.schema import RunConfig
from post_dist.data.order import rank_batches
from post_dist.errors import InputError
from post_dist.models.size import ModelSize
from post_dist.models.student import stand_in_layers
from post_dist.planning import cost
from post_dist.planning.hardware import Machine
from post_dist.planning.memory import GATHERED, GIB, frozen_memory, fullest, student_memory
from post_dist.planning.simulation import STORAGE_GB_PER_SECOND, young_interval
from post_dist.stages.distill.signals import kept_bytes, kept_names

_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
_REPLICATE_BELOW = 0.4
"""A frozen model that takes no more than this share of a GPU stands whole on each: nothing is gathered."""
_RESERVED_GIB = 2.0
"""CUDA, NCCL and what the allocator cannot use."""


@dataclass(frozen=True)
class Models:
    """What the run file trains and runs, by size."""

    teacher: ModelSize
    student: ModelSize
    upper: ModelSize
    """The student above its frozen layers."""
    trained: int
    """Elements of the student that are trained."""


def models_of(config: RunConfig, teacher: ModelSize) -> Models:
    """The sizes of the teacher and of the student that is cut from it."""
    section = config.student
    if section is None:
        raise InputError("plan needs the sections `teacher` and `student`")
    student = teacher.cut(stand_in_layers(section, len(teacher.layers)))
    upper = student.above(section.frozen_lower_layers)
    trained = sum(sum(layer.weights) for layer in upper.layers)
    trained += 0 if section.freeze_head else upper.head
    trained += 0 if section.freeze_embeddings else sum(upper.others) - upper.head
    return Models(teacher, student, upper, trained)


def shard_group_size(config: RunConfig, machine: Machine) -> int:
    """How many ranks share a frozen model, by `engine.shard_group`."""
    wanted = config.engine.shard_group
    return (
        machine.ranks if wanted == "all" else machine.gpus_per_node if wanted == "node" else wanted
    )


def _spread(
    stage: Literal["distill", "transfer"], config: RunConfig, machine: Machine
) -> list[str]:
    """What of the layout over the ranks the run refuses (`runtime.zero.shard_group`), and ranks that would have nothing to do."""
    ranks, group, batch = (
        machine.ranks,
        shard_group_size(config, machine),
        getattr(config, stage).batch_size,
    )
    conflicts = []
    if ranks % group:
        conflicts.append(f"engine.shard_group: {ranks} ranks do not part into groups of {group}")
    if group == 1 < ranks and config.engine.offload != "none":
        conflicts.append(
            "engine.shard_group is one rank, which keeps frozen models whole on it: nothing to offload"
        )
    if batch < ranks:
        conflicts.append(
            f"{stage}.batch_size {batch} leaves {ranks - batch} of {ranks} GPUs without a row"
        )
    return conflicts


def advised_group(size: ModelSize, machine: Machine, bytes_each: int) -> tuple[str, str]:
    """The smallest shard group that fits, and why: fewer ranks gather less, and a node's links are the fastest."""
    capacity, whole = machine.hardware.memory_gib * GIB, size.parameters * bytes_each
    if whole <= _REPLICATE_BELOW * capacity:
        return (
            "1",
            f"{whole / GIB:.0f} GiB stand on each GPU of {machine.hardware.memory_gib:g}: nothing is gathered",
        )
    part = whole / machine.gpus_per_node
    if part <= _REPLICATE_BELOW * capacity:
        return (
            "node",
            f"{part / GIB:.1f} GiB of {whole / GIB:.0f} on each GPU of a node: no weight crosses the network",
        )
    return "all", f"{whole / GIB:.0f} GiB do not fit into one node beside the rest"


def _finished(stage: str, machine: Machine, ranks: int, found: dict[str, Any]) -> dict[str, Any]:
    """Sums, and what follows from them."""
    memory = found["memory_gib"] | {"reserved": _RESERVED_GIB}
    total = fullest(memory, found.pop("moments", []))
    conflicts = list(found.pop("conflicts", []))
    # Of what is offloaded, a node's memory holds the parts of all its GPUs.
    host = machine.gpus_per_node * found.pop("host_bytes", 0.0) / GIB
    fits = total <= machine.hardware.memory_gib and host <= machine.hardware.host.memory_gib
    if host > machine.hardware.host.memory_gib:
        conflicts.append(
            f"{host:.1f} GiB are offloaded to a node of {machine.hardware.host.memory_gib:g} GiB"
        )
    if total > machine.hardware.memory_gib:
        largest = max(memory, key=lambda part: memory[part])
        conflicts.append(
            f"{total:.1f} GiB on a GPU of {machine.hardware.memory_gib:g} GiB, most of it {largest} ({memory[largest]:.1f})"
        )
    return found | {
        "stage": stage,
        "gpus": ranks,
        "memory_gib": memory,
        "memory_total_gib": total,
        "node_memory_gib": host or None,
        "fits": fits,
        "gpu_hours": found["hours"] * ranks,
        "conflicts": conflicts,
    }


def distill(
    config: RunConfig, models: Models, machine: Machine, precision: Precision
) -> dict[str, Any]:
    """A teacher that is sharded in groups, and the student that all ranks train."""
    section, corpus, student_section, hardware = (
        config.distill,
        config.corpus,
        config.student,
        machine.hardware,
    )
    if corpus is None or student_section is None:
        raise InputError("plan needs the sections `corpus` and `student`")
    ranks, group, each = machine.ranks, shard_group_size(config, machine), _BYTES[precision]
    own = rank_batches(range(section.batch_size), section.micro_batch_size_per_gpu, 0, ranks)
    passes, rows = len(own), max(len(share.rows) for share in own)
    length = corpus.sequence_length
    sequences = passes * rows
    flops = cost.distill_flops(
        models.teacher, models.upper, sequences, length, freeze_head=student_section.freeze_head
    )
    stage = config.engine.zero_stage
    settings: dict[str, Any] = {
        "zero_stage": stage,
        "group": group,
        "ranks": ranks,
        "passes": passes,
        "bytes_each": each,
    }
    moved = cost.distill_bytes(models.teacher, models.trained, models.upper, **settings)
    trunk = models.teacher.without_one_table
    of_teacher = passes * cost.gathered_bytes(trunk.weights, group, each)
    of_student = moved["gather"] - of_teacher
    asked, kept = _asked_and_kept(config, models, precision)
    flops["teacher"] *= asked
    if section.cache == "sampled":  # the student runs its frozen layers itself
        whole, upper = (
            cost.forward_flops(size, sequences, length) for size in (models.student, models.upper)
        )
        flops["student_forward"] += whole - upper
    moved["gather"] = of_student + asked * of_teacher
    fetched = asked * passes * _fetched(config, trunk, group, each)
    rate = hardware.flops_per_second(precision)
    teacher, student = (
        flops["teacher"] / rate,
        (flops["student_forward"] + flops["student_backward"]) / rate,
    )
    gather = machine.wire_seconds(
        asked * of_teacher, group, asked * passes * len(models.teacher.layers)
    )
    fetch = fetched / hardware.host_bytes_per_second()
    reduce = machine.wire_seconds(moved["reduce"] + of_student, ranks, 2)
    held = rows * length
    passed = asked * cost.forward_pass_bytes(models.teacher, held, each) + cost.forward_pass_bytes(
        models.upper, held, each
    )
    passed += cost.backward_pass_bytes(models.upper, held, each) + cost.logit_bytes(
        models.upper, held
    )
    passed = passes * passed + cost.optimizer_bytes(models.trained / (ranks if stage else 1), each)
    over_memory = passed / hardware.memory_bytes_per_second()
    tokens = section.batch_size * length
    signals = (
        (1 + asked) * tokens * kept / (STORAGE_GB_PER_SECOND * 1e9)
    )  # written once, read in every step
    if hardware.overlap:
        step = (
            max(teacher, fetch + gather)
            + student
            + max(0.0, reduce - flops["student_backward"] / rate)
            + over_memory
            + signals
        )
    else:
        step = teacher + fetch + gather + student + reduce + over_memory + signals
    sizes: dict[str, Any] = {"ranks": ranks, "tokens": held, "bytes_each": each}
    memory = frozen_memory(models.teacher, config.engine, group, each)
    memory["teacher_activations"] = cost.activation_elements(models.teacher) * held * each / GIB
    memory |= student_memory(config.engine, models.upper, models.trained, **sizes)
    if not student_section.freeze_head:
        table = models.upper.width * models.upper.vocabulary * each / GIB
        memory["teacher_head"] = table
        memory["logits"] += (
            2 * table
        )  # their gradient's way to the head's weights: that of one piece, and the sum
    # Those of the pass before stay, and so does the buffer for a rank's part of them.
    gradients = () if passes > 1 or stage >= 2 else ("student_gradients",)
    moments = [(*GATHERED, "teacher_activations"), ("student_gathered", "activations", "logits")]
    # ZeRO-3 keeps its bucket from step to step.
    moments.append(
        ("student_gathered", "activations", *gradients, *(["gradient_bucket"] if stage < 3 else []))
    )
    checkpoint = (cost.ADAM_BYTES + each) * models.trained / GIB
    conflicts = _spread("distill", config, machine)
    if stage == 3 and not student_section.freeze_head:
        conflicts.append(
            "a trained head does not go with engine.zero_stage 3: take zero_stage 2 or student.freeze_head true"
        )
    if models.teacher.tied and student_section.freeze_head != student_section.freeze_embeddings:
        conflicts.append(
            "embeddings and head are one tensor: set student.freeze_embeddings and student.freeze_head alike"
        )
    if models.teacher.context is not None and length > models.teacher.context:
        conflicts.append(
            f"corpus.sequence_length {length} exceeds the teacher's context of {models.teacher.context}"
        )
    if corpus.max_tokens and corpus.max_tokens // length <= corpus.held_out_sequences:
        conflicts.append(
            f"corpus.max_tokens make {corpus.max_tokens // length} sequences, and {corpus.held_out_sequences} are to be held out"
        )
    advice, why = advised_group(models.teacher, machine, each)
    found = {
        "memory_gib": memory,
        "moments": moments,
        "flops_per_gpu": flops,
        "received_gib_per_gpu": {kind: size / GIB for kind, size in moved.items()}
        | _there(fetch=fetched / GIB),
        "seconds": {
            "teacher": teacher,
            "gather": gather,
            "student": student,
            "reduce": reduce,
            "memory": over_memory,
        }
        | _there(fetch=fetch, signals=signals),
        "step_seconds": step,
        "steps": section.steps,
        "hours": section.steps * step / 3600,
        "tokens_per_second": tokens / step,
        "model_flops_utilisation": sum(flops.values())
        / step
        / (hardware.teraflops[precision] * 1e12),
        "shard_group": {"size": group, "advised": advice, "why": why},
        "checkpoint_gib": checkpoint,
        "teacher_signals_gib": asked * section.steps * tokens * kept / GIB if kept else None,
        "checkpoint_interval_seconds": young_interval(
            checkpoint * GIB / (STORAGE_GB_PER_SECOND * 1e9), ranks
        ),
        "host_bytes": _offloaded(config, models.teacher, group, each)
        + (cost.ADAM_BYTES * models.trained / ranks if config.engine.offload_optimizer else 0.0),
        "conflicts": conflicts,
    }
    return _finished("distill", machine, ranks, found)


def _there(**parts: float) -> dict[str, float]:
    """Those that are not 0: only some runs have them."""
    return {name: value for name, value in parts.items() if value}


def _fetched(config: RunConfig, frozen: ModelSize, group: int, bytes_each: int) -> float:
    """Bytes of offloaded shards that a rank copies to its GPU for one pass; ZeRO-3 does so before each gather, in the same stream."""
    return 0.0 if config.engine.offload == "none" else cost.shard_bytes(frozen, group, bytes_each)


def _offloaded(config: RunConfig, frozen: ModelSize, group: int, bytes_each: int) -> float:
    """Bytes of a rank's shard that lie in the host's memory."""
    return cost.shard_bytes(frozen, group, bytes_each) if config.engine.offload == "cpu" else 0.0


def _asked_and_kept(config: RunConfig, models: Models, precision: Precision) -> tuple[float, int]:
    """The share of the steps' sequences that the teacher runs over, and the bytes kept of a token: all and none without a cache.

    A corpus of unknown size is taken to hold a new sequence for each step.
    """
    section, corpus, student = config.distill, config.corpus, config.student
    if section.cache == "none" or corpus is None or student is None:
        return 1.0, 0
    wanted = section.steps * section.batch_size
    held = (
        corpus.max_tokens // corpus.sequence_length - corpus.held_out_sequences
        if corpus.max_tokens
        else wanted
    )
    names = kept_names(section, student, exact_product=precision == "fp32")
    return min(1.0, max(0, held) / wanted), kept_bytes(
        names, models.teacher.width, _BYTES[precision]
    )


def tune(
    config: RunConfig, models: Models, machine: Machine, precision: Precision
) -> dict[str, Any]:
    """One GPU: a forward and a backward by what goes in, of rows behind a prompt that is run once; a prompt for each row of privacy."""
    section, wanted, size, each = config.tune, config.all_privacy, models.student, _BYTES[precision]
    text, responses = _lengths(config)
    length = section.num_virtual_tokens + text + responses
    rows = [(plan.enabled and plan.expected_batch_size) or section.batch_size for plan in wanted]
    steps = [(plan.enabled and plan.steps) or section.steps for plan in wanted]
    flops = [
        2
        * (
            cost.forward_flops(size, count, length)
            + cost.head_flops(size, count * (responses or 1))
        )
        for count in rows
    ]
    seconds = [one / machine.hardware.flops_per_second(precision) for one in flops]
    trials = section.search and section.search.mean_trials
    micro = section.micro_batch_size_per_gpu
    kept = len(size.layers) * cost.activation_elements(size, trained=False)
    found: dict[str, Any] = {
        "memory_gib": {
            "student_weights": size.parameters * each / GIB,
            "activations": kept * micro * length * each / GIB,
            "logits": 3 * micro * (responses or 1) * size.vocabulary * 4 / GIB,
        },
        "flops_per_gpu": {"forward_and_backward": max(flops)},
        "step_seconds": max(seconds),
        "steps": max(steps),
        "prompts": len(wanted),
        "trials_of_each": trials,
        "hours": (trials or 1)
        * sum(step * count for step, count in zip(seconds, steps, strict=True))
        / 3600,
        "conflicts": _room(config, size),
    }
    if any(plan.enabled for plan in wanted):
        from post_dist.privacy.accounting import account, private_plans

        found["epsilon"] = [account(plan).epsilon for plan in private_plans(config)]
    return _finished("tune", machine, 1, found)


def _lengths(config: RunConfig) -> tuple[int, int]:
    """Most tokens of a text and of its response; 0 of the latter for classes."""
    task = config.private_task or config.public_task
    return (task.max_length, task.response_length) if task else (128, 0)


def _room(config: RunConfig, size: ModelSize) -> list[str]:
    text, responses = _lengths(config)
    prompt = config.tune.num_virtual_tokens
    if size.context is None or prompt + text + responses <= size.context:
        return []
    texts = f"texts of {text}" + (f" with responses of {responses}" if responses else "")
    return [
        f"a prompt of {prompt} tokens and {texts} exceed the context of {size.context}: lower tune.num_virtual_tokens"
    ]


def transfer(
    config: RunConfig, models: Models, machine: Machine, precision: Precision
) -> dict[str, Any]:
    """A target that is sharded as the teacher is, and the prompts that are trained on it, some beside each other; a step is the dearest."""
    section, ranks = config.transfer, machine.ranks
    by_classes = _compared(config)
    rounds = [
        by_classes[start : start + section.prompts_at_once]
        for start in range(0, len(by_classes), section.prompts_at_once)
    ]
    steps = [_transfer_step(config, models, machine, precision, beside) for beside in rounds]
    advice, why = advised_group(models.teacher, machine, _BYTES[precision])
    group = shard_group_size(config, machine)
    found = max(steps, key=lambda step: step["step_seconds"]) | {
        "steps": section.steps,
        "prompts": len(by_classes),
        "hours": section.steps * sum(step["step_seconds"] for step in steps) / 3600,
        "shard_group": {"size": group, "advised": advice, "why": why},
        "host_bytes": _offloaded(config, models.teacher, group, _BYTES[precision]),
        "conflicts": _room(config, models.teacher) + _spread("transfer", config, machine),
    }
    return _finished("transfer", machine, ranks, found)


def _compared(config: RunConfig) -> list[bool]:
    """For each prompt that is carried over, in the order of the run, whether class scores are compared."""
    own, sources = config.transfer.scores == "classes", config.inputs.source_prompt
    if isinstance(sources, tuple):
        return [own] * len(sources)
    published = [False] if "published transfer" in config.evaluate.baselines else []
    return [own, *published] * (1 + len(config.evaluate.private_rows))


def _transfer_step(
    config: RunConfig,
    models: Models,
    machine: Machine,
    precision: Precision,
    by_classes: Sequence[bool],
) -> dict[str, Any]:
    """Of prompts that are trained beside each other: each has rows of its own, and one gathering of the target serves all."""
    section, hardware, target, together = (
        config.transfer,
        machine.hardware,
        models.teacher,
        len(by_classes),
    )
    ranks, group, each = machine.ranks, shard_group_size(config, machine), _BYTES[precision]
    rows = max(
        len(share.rows)
        for share in rank_batches(range(section.batch_size), section.batch_size, 0, ranks)
    )
    text, responses = _lengths(config)
    n, length, answers = config.tune.num_virtual_tokens, text + responses, rows * (responses or 1)
    of_each = [
        cost.transfer_flops(
            target, models.student, rows, length, n, by_classes=classes, responses=responses
        )
        for classes in by_classes
    ]
    flops = {name: sum(one[name] for one in of_each) for name in of_each[0]}
    moved = cost.transfer_bytes(target, together * n, group=group, ranks=ranks, bytes_each=each)
    compute = sum(flops.values()) / hardware.flops_per_second(precision)
    fetched = sum(
        _fetched(config, part, group, each) for part in (target, target.without_one_table)
    )
    gather = machine.wire_seconds(moved["gather"], group, 2 * len(target.layers))
    fetch = fetched / hardware.host_bytes_per_second()
    reduce = machine.wire_seconds(moved["reduce"], ranks, together)
    tokens = together * cost.transfer_tokens(target, rows, length, n, responses=responses)
    of_layer = cost.activation_elements(target, trained=False)
    kept = target.width if config.engine.activation_checkpointing else of_layer
    passed = cost.forward_pass_bytes(target, tokens, each) + cost.backward_pass_bytes(
        target, tokens, each
    )
    passed += cost.logit_bytes(target, together * answers)
    over_memory = passed / hardware.memory_bytes_per_second()
    step = (
        (max(compute, fetch + gather) if hardware.overlap else compute + fetch + gather)
        + reduce
        + over_memory
    )
    return {
        "memory_gib": frozen_memory(target, config.engine, group, each)
        | {
            "student_weights": models.student.parameters * each / GIB,
            "activations": (len(target.layers) * kept + of_layer) * tokens * each / GIB,
            "logits": sum(3 if classes else 8 for classes in by_classes)
            * answers
            * target.vocabulary
            * 4
            / GIB,
        },
        "flops_per_gpu": flops,
        "received_gib_per_gpu": {kind: size / GIB for kind, size in moved.items()}
        | _there(fetch=fetched / GIB),
        "seconds": {"compute": compute, "gather": gather, "reduce": reduce, "memory": over_memory}
        | _there(fetch=fetch),
        "step_seconds": step,
        "prompts_at_once": together,
        "samples_per_second": together * section.batch_size / step,
        "model_flops_utilisation": sum(flops.values())
        / step
        / (hardware.teraflops[precision] * 1e12),
    }
