"""The plan of distillation: a sharded teacher, and a student that all ranks train."""

import math
from dataclasses import dataclass, replace

from post_dist.config.schema import Student
from post_dist.config.sources import Corpus
from post_dist.conflicts import Conflict
from post_dist.data.order import rank_batches
from post_dist.planning import cost
from post_dist.planning.estimate import StageEstimate
from post_dist.planning.inputs import PlanInputs, models_of, needed_sections
from post_dist.planning.layout import (
    fetched_bytes,
    group_numbers,
    idle_conflicts,
    nonzero,
    offloaded_bytes,
)
from post_dist.planning.memory import GATHERED, GIB, frozen_memory, fullest, student_memory
from post_dist.planning.signals import stored_signals
from post_dist.planning.simulation import STORAGE_GB_PER_SECOND, young_interval
from post_dist.stages.distill.attack_config import attack_config
from post_dist.stages.distill.conflicts import conflicts, required_sections

_STORAGE_BYTES_PER_SECOND = STORAGE_GB_PER_SECOND * 1e9


@dataclass(frozen=True)
class _Work:
    """What one rank runs in a step.

    Attributes:
        student: the run file's section `student`.
        passes: number of micro-batches.
        served: number of micro-batches that one pass of the teacher serves.
        sequences_at_once: sequences of one micro-batch.
        length: tokens of one sequence.
        teacher_share: share of the sequences that the teacher runs over in these steps: 1 without a
            cache, 0 if workers write the signals.
        kept_bytes: bytes of the teacher's signal that are cached for each token; 0 without a cache.
        signal_bytes: bytes of cached signals on the disk.
    """

    student: Student
    passes: int
    served: int
    sequences_at_once: int
    length: int
    teacher_share: float
    kept_bytes: int
    signal_bytes: float

    @property
    def sequences(self) -> int:
        """Sequences of a step."""
        return self.passes * self.sequences_at_once

    @property
    def tokens_at_once(self) -> int:
        """Tokens of one micro-batch."""
        return self.sequences_at_once * self.length

    @property
    def teacher_passes(self) -> float:
        """Passes of the teacher in a step. With a cache, a mean over all steps."""
        return self.teacher_share * math.ceil(self.passes / self.served)


@dataclass(frozen=True)
class _Traffic:
    """Bytes that one rank receives in a step.

    Attributes:
        gather_teacher: weights of the teacher.
        gather_student: weights of the student.
        reduce: gradients.
        fetch: offloaded shards of the teacher, from host memory.
    """

    gather_teacher: float
    gather_student: float
    reduce: float
    fetch: float


@dataclass(frozen=True)
class _Seconds:
    """Seconds of the parts of a step, each by itself."""

    teacher: float
    gather: float
    fetch: float
    student: float
    student_backward: float
    reduce: float
    memory: float
    signals: float

    def of_step(self, *, overlap: bool) -> float:
        """Compute the time of a step, with or without overlap of collectives and computation."""
        # Without overlap, all parts run one after the other.
        if not overlap:
            return (
                self.teacher
                + self.fetch
                + self.gather
                + self.student
                + self.reduce
                + self.memory
                + self.signals
            )
        # Weights arrive while the teacher computes, and gradients leave while the backward pass of
        # the student still runs.
        return (
            max(self.teacher, self.fetch + self.gather)
            + self.student
            + max(0.0, self.reduce - self.student_backward)
            + self.memory
            + self.signals
        )


@dataclass(frozen=True)
class _Distillation:
    """What a distillation needs: that of the student itself, or an attack on it.

    Attributes:
        work: what one rank runs in a step.
        flops: operations of one rank's step, by part.
        traffic: bytes that one rank receives in a step.
        seconds: seconds of the parts of a step.
        step_seconds: duration of a step.
        all_seconds: duration of all steps.
        memory: memory of one GPU by part, in GiB.
        moments: for each moment of a step, the parts that exist only then.
    """

    work: _Work
    flops: dict[str, float]
    traffic: _Traffic
    seconds: _Seconds
    step_seconds: float
    all_seconds: float
    memory: dict[str, float]
    moments: list[tuple[str, ...]]


def plan_distill(inputs: PlanInputs) -> StageEstimate:
    """Estimate distillation.

    Raises:
        InputError: the run file lacks a section.
    """
    config = inputs.config
    section = config.distill
    _, student, corpus = needed_sections(config)
    own = _distillation(inputs, corpus, student)
    flops, traffic, seconds = own.flops, own.traffic, own.seconds

    # The whole stage. The attacks run after the student is trained.
    attacks = [_attack(inputs, tokens) for tokens in section.attack_tokens]
    attack_hours = sum(attack.all_seconds for attack in attacks) / 3600
    hours = own.all_seconds / 3600 + attack_hours
    # An attack trains all layers, so it may need more memory.
    fullest_one = max([own, *attacks], key=lambda each: fullest(each.memory, each.moments))

    # A checkpoint holds what the optimizer keeps, whatever the precision of the run.
    checkpoint = cost.ADAM_BYTES * inputs.models.trained
    save_seconds = checkpoint / _STORAGE_BYTES_PER_SECOND

    gather = traffic.gather_student + traffic.gather_teacher
    received = {"gather": gather, "reduce": traffic.reduce} | nonzero(fetch=traffic.fetch)
    numbers = {
        "flops_per_gpu": flops,
        "received_gib_per_gpu": {kind: size / GIB for kind, size in received.items()},
        "seconds": {
            "teacher": seconds.teacher,
            "gather": seconds.gather,
            "student": seconds.student,
            "reduce": seconds.reduce,
            "memory": seconds.memory,
        }
        | nonzero(fetch=seconds.fetch, signals=seconds.signals),
        "step_seconds": own.step_seconds,
        "steps": section.steps,
        "tokens_per_second": section.batch_size * own.work.length / own.step_seconds,
        "model_flops_utilisation": inputs.utilization(sum(flops.values()), own.step_seconds),
        "shard_group": group_numbers(inputs),
        "checkpoint_gib": checkpoint / GIB,
        "checkpoint_interval_seconds": young_interval(save_seconds, inputs.machine.ranks),
        "teacher_signals_gib": own.work.signal_bytes / GIB or None,
    } | nonzero(attack_hours=attack_hours)
    return StageEstimate(
        stage="distill",
        ranks=inputs.machine.ranks,
        hours=hours,
        memory_gib=fullest_one.memory,
        numbers=numbers,
        conflicts=_conflicts(inputs),
        moments=fullest_one.moments,
        host_bytes=_host_bytes(inputs),
    )


def _distillation(inputs: PlanInputs, corpus: Corpus, student: Student) -> _Distillation:
    """Estimate the steps of a distillation."""
    # What one rank computes, receives and waits for in a step.
    work = _work(inputs, corpus, student)
    flops = _flops(inputs, work)
    traffic = _traffic(inputs, work)
    seconds = _seconds(inputs, work, flops, traffic)
    step = seconds.of_step(overlap=inputs.overlap)
    all_seconds = inputs.config.distill.steps * step
    return _Distillation(work, flops, traffic, seconds, step, all_seconds, *_memory(inputs, work))


def _attack(inputs: PlanInputs, tokens: int) -> _Distillation:
    """Estimate the further distillation of a copy of the student on a number of tokens."""
    # No layer is frozen, so other parts of the student are trained.
    config = attack_config(inputs.config, tokens)
    models = models_of(config, inputs.models.teacher)
    of_attack = replace(inputs, config=config, models=models)
    return _distillation(of_attack, *required_sections(config))


def _conflicts(inputs: PlanInputs) -> list[Conflict]:
    """List the settings that the stage refuses, and idle GPUs."""
    machine = inputs.machine
    batch_size = inputs.config.distill.batch_size
    found = conflicts(inputs.config, inputs.models.teacher.facts, machine.layout)
    return [*found, *idle_conflicts("distill", batch_size, machine.ranks)]


def _work(inputs: PlanInputs, corpus: Corpus, student: Student) -> _Work:
    """Compute what one rank runs in a step."""
    section = inputs.config.distill
    # Rank 0 has at least as many examples as any other rank.
    own = rank_batches(
        range(section.batch_size), section.micro_batch_size_per_gpu, 0, inputs.machine.ranks
    )
    # Without a cache the teacher runs in every step, and nothing is kept.
    share = 1.0
    kept = 0
    on_disk = 0.0
    if section.cache != "none":
        stored = stored_signals(inputs, corpus, student)
        kept = stored.bytes_per_token
        on_disk = stored.disk_bytes
        # Workers run beside these steps. The plan assumes that they are ahead of them.
        by_workers = inputs.config.cluster.signals.workers > 0
        share = 0.0 if by_workers else stored.sequences / (section.steps * section.batch_size)
    return _Work(
        student=student,
        passes=len(own),
        served=min(section.micro_batches_per_teacher_pass, len(own)),
        sequences_at_once=max(len(batch.rows) for batch in own),
        length=corpus.sequence_length,
        teacher_share=share,
        kept_bytes=kept,
        signal_bytes=on_disk,
    )


def _flops(inputs: PlanInputs, work: _Work) -> dict[str, float]:
    """Count the operations of one rank's step."""
    models = inputs.models
    flops = cost.distill_flops(
        models.teacher,
        models.upper,
        work.sequences,
        work.length,
        freeze_head=work.student.freeze_head,
    )
    flops["teacher"] *= work.teacher_share
    if inputs.config.distill.cache == "sampled":
        # A cache of samples has no hidden states, so the student runs its frozen layers itself.
        whole = cost.forward_flops(models.student, work.sequences, work.length)
        upper = cost.forward_flops(models.upper, work.sequences, work.length)
        flops["student_forward"] += whole - upper
    return flops


def _traffic(inputs: PlanInputs, work: _Work) -> _Traffic:
    """Compute the bytes that one rank receives in a step."""
    models = inputs.models
    moved = cost.distill_bytes(
        models.teacher,
        models.upper,
        inputs.sharding,
        trained=models.trained,
        zero_stage=inputs.config.engine.zero_stage,
        passes=work.passes,
        # The teacher is counted separately: its gathers hide behind another computation.
        teacher_passes=0,
    )
    trunk = models.teacher.without_one_table
    gathered = cost.gathered_bytes(trunk.weights, inputs.group, inputs.bytes_each)
    return _Traffic(
        gather_teacher=work.teacher_passes * gathered,
        gather_student=moved["gather"],
        reduce=moved["reduce"],
        fetch=work.teacher_passes * fetched_bytes(inputs, [trunk]),
    )


def _seconds(
    inputs: PlanInputs, work: _Work, flops: dict[str, float], traffic: _Traffic
) -> _Seconds:
    """Compute the seconds of each part of a step.

    Args:
        inputs: models and hardware.
        work: what one rank runs.
        flops: operations by part.
        traffic: bytes that one rank receives.
    """
    machine = inputs.machine
    hardware = machine.hardware
    rate = inputs.flops_per_second
    # One collective a layer, in each pass of the teacher.
    gathers = work.teacher_passes * len(inputs.models.teacher.layers)
    # The student's gradients and weights take one collective each.
    reduced = traffic.reduce + traffic.gather_student
    # The signal is written once, by the teacher, and read in every step.
    tokens = inputs.config.distill.batch_size * work.length
    signal_bytes = (1 + work.teacher_share) * tokens * work.kept_bytes
    return _Seconds(
        teacher=flops["teacher"] / rate,
        gather=machine.collective_seconds(traffic.gather_teacher, inputs.group, gathers),
        fetch=traffic.fetch / hardware.host_bytes_per_second(),
        student=(flops["student_forward"] + flops["student_backward"]) / rate,
        student_backward=flops["student_backward"] / rate,
        reduce=machine.collective_seconds(reduced, machine.ranks, 2),
        memory=_passed_bytes(inputs, work) / hardware.memory_bytes_per_second(),
        signals=signal_bytes / _STORAGE_BYTES_PER_SECOND,
    )


def _passed_bytes(inputs: PlanInputs, work: _Work) -> float:
    """Compute the bytes that a step moves through a GPU's memory, without matrix products."""
    models = inputs.models
    each = inputs.bytes_each
    tokens = work.tokens_at_once
    teacher = work.teacher_share * cost.forward_pass_bytes(models.teacher, tokens, each)
    student = cost.backward_pass_bytes(models.upper, tokens, each)
    one_pass = (
        teacher
        + cost.forward_pass_bytes(models.upper, tokens, each)
        + student
        + cost.logit_bytes(models.upper, tokens)
    )
    # Above ZeRO-0, each rank steps its part of the weights.
    shards = inputs.machine.ranks if inputs.config.engine.zero_stage else 1
    return work.passes * one_pass + cost.optimizer_bytes(models.trained / shards, each)


def _memory(inputs: PlanInputs, work: _Work) -> tuple[dict[str, float], list[tuple[str, ...]]]:
    """Compute the memory of one GPU by part, and which parts exist at which moment."""
    models = inputs.models
    engine = inputs.config.engine
    each = inputs.bytes_each
    tokens = work.tokens_at_once

    # The teacher keeps no activations for a backward pass: one layer's are alive at a time.
    memory = frozen_memory(models.teacher, engine, inputs.group, each)
    in_a_layer = cost.activation_elements(models.teacher)
    memory["teacher_activations"] = in_a_layer * work.served * tokens * each / GIB
    # Of a single micro-batch they are small beside its activations.
    if work.served > 1:
        memory["teacher_hidden_states"] = _hidden_state_bytes(inputs, work) / GIB
    memory |= student_memory(
        engine,
        models.upper,
        models.trained,
        ranks=inputs.machine.ranks,
        tokens=tokens,
        bytes_each=each,
    )
    if not work.student.freeze_head:
        # The teacher's head is kept beside the trained one. The gradient of the head's weights is
        # held twice: of one piece of the logits, and their sum.
        table = models.upper.width * models.upper.vocabulary * each / GIB
        memory["teacher_head"] = table
        memory["logits"] += 2 * table

    # Three moments of a pass: the teacher runs, the student's logits exist, it runs backward.
    teacher_forward = (*GATHERED, "teacher_activations")
    student_loss = ("student_gathered", "activations", "logits")
    student_backward = ["student_gathered", "activations"]
    # Gradients stay from one pass to the next, and ZeRO-2 keeps the buffer of a rank's own part.
    gradients_stay = work.passes > 1 or engine.zero_stage >= 2
    if not gradients_stay:
        student_backward.append("student_gradients")
    # ZeRO-3 keeps its bucket from step to step.
    if engine.zero_stage < 3:
        student_backward.append("gradient_bucket")
    return memory, [teacher_forward, student_loss, tuple(student_backward)]


def _hidden_state_bytes(inputs: PlanInputs, work: _Work) -> float:
    """Compute the bytes of the teacher's outputs that wait for the student."""
    # The student reads a copy of its own micro-batch. The last good one stays too, to stand in for
    # one whose loss is not finite.
    kept = work.served + 2
    # The student also starts from the output of a frozen lower block.
    states = 1
    if inputs.config.distill.layers_in_teacher(work.student):
        states = 2
    width = inputs.models.teacher.width
    return kept * states * work.tokens_at_once * width * inputs.bytes_each


def _host_bytes(inputs: PlanInputs) -> float:
    """Compute the bytes that one rank keeps in host memory."""
    of_teacher = offloaded_bytes(inputs)
    if not inputs.config.engine.offload_optimizer:
        return of_teacher
    # An offloaded optimizer is sharded: the run file asks for ZeRO-1 or more.
    return of_teacher + cost.ADAM_BYTES * inputs.models.trained / inputs.machine.ranks
