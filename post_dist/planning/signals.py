"""The plan of the teacher's signals: what a cache stores, and the workers that write it."""

from dataclasses import dataclass, replace
from math import ceil

from post_dist.config.schema import RunConfig, Student
from post_dist.config.sources import Corpus
from post_dist.planning import cost
from post_dist.planning.estimate import StageEstimate
from post_dist.planning.hardware import Machine
from post_dist.planning.inputs import PlanInputs
from post_dist.planning.layout import fetched_bytes, group_numbers, nonzero, offloaded_bytes
from post_dist.planning.memory import GATHERED, GIB, frozen_memory
from post_dist.planning.simulation import STORAGE_GB_PER_SECOND
from post_dist.runtime.engine_conflicts import engine_conflicts
from post_dist.stages.distill.signal_files import SEQUENCES_A_FILE, files_of
from post_dist.stages.distill.signal_format import exact_product, kept_bytes, kept_names


@dataclass(frozen=True)
class StoredSignals:
    """The signals that a cache stores.

    Attributes:
        names: names of the tensors.
        sequences: number of sequences that the teacher runs over.
        bytes_per_token: bytes that are stored for each token.
        disk_bytes: bytes of all files, or of those that fit into `distill.cache_gib`.
    """

    names: list[str]
    sequences: int
    bytes_per_token: int
    disk_bytes: float


def stored_signals(inputs: PlanInputs, corpus: Corpus, student: Student) -> StoredSignals:
    """Compute what the cache of a run stores. `distill.cache` is not `none`."""
    facts = inputs.models.teacher.facts
    exact = exact_product(facts, fp32=inputs.precision == "fp32")
    names = kept_names(inputs.config.distill, student, exact_product=exact)
    each = kept_bytes(names, facts.width, inputs.bytes_each)
    sequences = _sequences(inputs.config, corpus)
    limit = inputs.config.distill.cache_gib or float("inf")
    on_disk = min(sequences * corpus.sequence_length * each, limit * GIB)
    return StoredSignals(names, sequences, each, on_disk)


def _sequences(config: RunConfig, corpus: Corpus) -> int:
    """Compute the number of sequences that a cached teacher runs over.

    The teacher runs once over each sequence of the files that are read, so it may be more than a
    short run reads. If the size of the corpus is unknown, the plan assumes that no step repeats a
    sequence.
    """
    # Later epochs read what the first one kept. Workers write whole files.
    in_files = files_of(config.distill.steps * config.distill.batch_size) * SEQUENCES_A_FILE
    if not corpus.max_tokens:
        return in_files
    in_corpus = corpus.max_tokens // corpus.sequence_length - corpus.held_out_sequences
    return min(in_files, max(0, in_corpus))


def plan_signals(inputs: PlanInputs, corpus: Corpus, student: Student) -> StageEstimate:
    """Estimate the workers of `cluster.signals`. A step is the teacher's pass of a micro-batch.

    Args:
        inputs: models and hardware; the nodes of a worker are those of `cluster.signals`.
        corpus: the section `corpus`.
        student: the section `student`.
    """
    config = inputs.config
    inputs = replace(inputs, machine=_worker_machine(inputs))
    machine = inputs.machine
    teacher = inputs.models.teacher
    stored = stored_signals(inputs, corpus, student)
    size = config.distill.micro_batch_size_per_gpu
    tokens = size * corpus.sequence_length

    # What one rank computes and receives for a micro-batch.
    flops = cost.forward_flops(teacher, size, corpus.sequence_length)
    if "entropy" in stored.names:
        flops += cost.head_flops(teacher, tokens)
    trunk = teacher.without_one_table
    gather = cost.gathered_bytes(trunk.weights, inputs.group, inputs.bytes_each)
    fetch = fetched_bytes(inputs, [trunk])
    passed = cost.forward_pass_bytes(teacher, tokens, inputs.bytes_each)
    ranks = config.cluster.signals.workers * machine.ranks
    seconds = {
        "teacher": flops / inputs.flops_per_second,
        "gather": machine.collective_seconds(gather, inputs.group, len(teacher.layers)),
        "memory": passed / machine.hardware.memory_bytes_per_second(),
        # All workers share the storage.
        "signals": ranks * tokens * stored.bytes_per_token / (STORAGE_GB_PER_SECOND * 1e9),
    } | nonzero(fetch=fetch / machine.hardware.host_bytes_per_second())
    step = _step_seconds(seconds, overlap=inputs.overlap)
    steps = ceil(stored.sequences / (ranks * size))

    memory = frozen_memory(teacher, config.engine, inputs.group, inputs.bytes_each)
    activations = cost.activation_elements(teacher) * tokens * inputs.bytes_each
    memory["teacher_activations"] = activations / GIB
    return StageEstimate(
        stage="signals",
        ranks=ranks,
        hours=steps * step / 3600,
        memory_gib=memory,
        numbers={
            "flops_per_gpu": {"teacher": flops},
            "received_gib_per_gpu": {"gather": gather / GIB} | nonzero(fetch=fetch / GIB),
            "seconds": seconds,
            "step_seconds": step,
            "steps": steps,
            "tokens_per_second": ranks * tokens / step,
            "model_flops_utilisation": inputs.utilization(flops, step),
            "shard_group": group_numbers(inputs),
            "teacher_signals_gib": stored.disk_bytes / GIB,
        },
        conflicts=engine_conflicts(config.engine, machine.layout),
        moments=[(*GATHERED, "teacher_activations")],
        host_bytes=offloaded_bytes(inputs),
    )


def _worker_machine(inputs: PlanInputs) -> Machine:
    """Return the nodes of one worker. Without GPUs in the run file, a node has the plan's."""
    asked = inputs.config.cluster.for_stage("signals")
    gpus = asked.gpus_per_node or inputs.machine.gpus_per_node
    return replace(inputs.machine, nodes=asked.nodes, gpus_per_node=gpus)


def _step_seconds(seconds: dict[str, float], *, overlap: bool) -> float:
    """Compute the time of a micro-batch, with or without weights that arrive during the pass."""
    if not overlap:
        return sum(seconds.values())
    arriving = seconds["gather"] + seconds.get("fetch", 0.0)
    return max(seconds["teacher"], arriving) + seconds["memory"] + seconds["signals"]
