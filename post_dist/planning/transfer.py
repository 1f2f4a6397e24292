"""The plan of the transfer: a sharded target, and prompts that are trained on it side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from post_dist.artifacts.task import PromptTask
from post_dist.config.schema import RunConfig
from post_dist.conflicts import Conflict
from post_dist.data.order import rank_batches
from post_dist.planning import cost
from post_dist.planning.cost import TransferBatch
from post_dist.planning.estimate import PartEstimate, StageEstimate
from post_dist.planning.fitted_head import plan_heads
from post_dist.planning.inputs import PlanInputs
from post_dist.planning.layout import (
    fetched_bytes,
    group_numbers,
    idle_conflicts,
    nonzero,
    offloaded_bytes,
)
from post_dist.planning.memory import GIB, frozen_memory
from post_dist.stages.conflicts import transfer_conflicts
from post_dist.stages.transfer.conflicts import SourcePrompt, TransferModels

_LOGIT_COPIES_OF_CLASSES = 3
_LOGIT_COPIES_OF_VOCABULARY = 8
"""Number of copies of the fp32 logits that exist at once, for classes and for the vocabulary."""


@dataclass(frozen=True)
class _Work:
    """What one rank runs in a step.

    Attributes:
        by_classes: for each prompt, whether class scores are compared.
        batch: the examples of one prompt, of maximum length.
    """

    by_classes: Sequence[bool]
    batch: TransferBatch

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return len(self.by_classes)

    @property
    def answers(self) -> float:
        """Number of positions of one prompt that have logits."""
        return self.batch.examples * (self.batch.responses or 1)


def plan_transfer(inputs: PlanInputs) -> StageEstimate:
    """Estimate the transfer. Its numbers are those of the most expensive step."""
    section = inputs.config.transfer
    by_classes = _prompts(inputs.config)
    parts: list[PartEstimate] = []
    trained = by_classes
    if section.adapter == "head":
        parts.append(plan_heads(inputs))
        # Only the baseline's prompts are trained. They compare the vocabulary.
        trained = [classes for classes in by_classes if not classes]
    # Prompts that do not fit side by side are trained in rounds, one after the other.
    for start in range(0, len(trained), section.trained_at_once):
        together = trained[start : start + section.trained_at_once]
        parts.append(_training(inputs, _work(inputs, together)))
    longest = max(parts, key=lambda part: part.numbers["step_seconds"])
    fullest = max(parts, key=lambda part: sum(part.memory_gib.values()))
    numbers = longest.numbers | {
        "prompts": len(by_classes),
        "shard_group": group_numbers(inputs),
    }
    return StageEstimate(
        stage="transfer",
        ranks=inputs.machine.ranks,
        hours=sum(part.seconds for part in parts) / 3600,
        memory_gib=fullest.memory_gib,
        numbers=numbers,
        conflicts=_conflicts(inputs),
        host_bytes=offloaded_bytes(inputs),
    )


def _prompts(config: RunConfig) -> list[bool]:
    """Return, for each prompt that is transferred, whether class scores are compared."""
    own = config.transfer.scores == "classes"
    sources = config.inputs.source_prompt
    # The prompts of several owners have no baselines, because their private data are not here.
    if isinstance(sources, tuple):
        return [own] * len(sources)
    of_each_source = [own]
    if "published transfer" in config.evaluate.baselines:
        of_each_source.append(False)
    return of_each_source * (1 + len(config.evaluate.private_rows))


def _conflicts(inputs: PlanInputs) -> list[Conflict]:
    """List the settings that the stage refuses, and idle GPUs.

    The plan knows only the number of other owners' prompts and the student's layers. So it assumes
    that the prompts have the run file's own task, and that the student has the same tokenizer.
    """
    config = inputs.config
    machine = inputs.machine
    found: list[Conflict] = []
    task = config.private_task or config.public_task
    if config.public_task is not None and task is not None:
        models = TransferModels(
            inputs.models.student.facts, inputs.models.teacher.facts, same_tokenizer=True
        )
        own_task = PromptTask.of_section(task, config.tune.init_text)
        prompt = SourcePrompt(config.tune.num_virtual_tokens, own_task)
        found += transfer_conflicts(config, models, [prompt], machine.layout)
    return [*found, *idle_conflicts("transfer", config.transfer.batch_size, machine.ranks)]


def _work(inputs: PlanInputs, by_classes: Sequence[bool]) -> _Work:
    """Compute what one rank runs in a step."""
    size = inputs.config.transfer.batch_size
    # The transfer accumulates nothing: a rank's part of the batch is one pass.
    own = rank_batches(range(size), size, 0, inputs.machine.ranks)
    text, response = inputs.text_lengths()
    batch = TransferBatch(
        examples=max(len(batch.rows) for batch in own),
        length=text + response,
        prompt=inputs.config.tune.num_virtual_tokens,
        responses=response,
    )
    return _Work(by_classes, batch)


def _training(inputs: PlanInputs, work: _Work) -> PartEstimate:
    """Estimate the training of some prompts side by side.

    Each prompt has its own examples; the target is gathered once for all.
    """
    hardware = inputs.machine.hardware
    machine = inputs.machine
    target = inputs.models.teacher
    flops = _flops(inputs, work)
    received = cost.transfer_bytes(
        target,
        _trained_values(inputs, work),
        inputs.sharding,
        inputs.config.transfer.lora_settings.upper_layers,
    )
    # The target is read once forward, and backward without its embeddings.
    fetched = fetched_bytes(inputs, [target, target.without_one_table])

    # Seconds of each part by itself, then of the step.
    compute = sum(flops.values()) / inputs.flops_per_second
    gather = machine.collective_seconds(received["gather"], inputs.group, 2 * len(target.layers))
    fetch = fetched / hardware.host_bytes_per_second()
    reduce = machine.collective_seconds(received["reduce"], machine.ranks, work.prompts)
    tokens = work.prompts * work.batch.tokens(target)
    memory = _passed_bytes(inputs, work, tokens) / hardware.memory_bytes_per_second()
    # Weights arrive while the layers before them compute. The prompt's gradient is complete only at
    # the end, so nothing hides its reduction.
    if inputs.overlap:
        compute_and_gather = max(compute, fetch + gather)
    else:
        compute_and_gather = compute + fetch + gather
    step = compute_and_gather + reduce + memory

    seconds = {"compute": compute, "gather": gather, "reduce": reduce, "memory": memory}
    received |= nonzero(fetch=fetched)
    numbers = {
        "flops_per_gpu": flops,
        "received_gib_per_gpu": {kind: size / GIB for kind, size in received.items()},
        "seconds": seconds | nonzero(fetch=fetch),
        "step_seconds": step,
        "steps": inputs.config.transfer.steps,
        "prompts_at_once": work.prompts,
        "samples_per_second": work.prompts * inputs.config.transfer.batch_size / step,
        "model_flops_utilisation": inputs.utilization(sum(flops.values()), step),
    }
    seconds_of_all = inputs.config.transfer.steps * step
    return PartEstimate(seconds_of_all, _memory(inputs, work, tokens), numbers)


def _trained_values(inputs: PlanInputs, work: _Work) -> int:
    """Count the values whose gradient is reduced: those of all prompts, or of a LoRA."""
    target = inputs.models.teacher
    lora = inputs.config.transfer.lora
    if lora is None:
        return work.prompts * inputs.config.tune.num_virtual_tokens * target.width
    return target.lora_values(lora)


def _flops(inputs: PlanInputs, work: _Work) -> dict[str, float]:
    """Count the operations of one rank's step, for all prompts together.

    The products of a LoRA are small and not counted.
    """
    of_prompts = [
        cost.transfer_flops(
            inputs.models.teacher,
            inputs.models.student,
            work.batch,
            by_classes=classes,
            upper_layers=inputs.config.transfer.lora_settings.upper_layers,
        )
        for classes in work.by_classes
    ]
    return {name: sum(flops[name] for flops in of_prompts) for name in of_prompts[0]}


def _passed_bytes(inputs: PlanInputs, work: _Work, tokens: float) -> float:
    """Compute the bytes that a step moves through a GPU's memory, without matrix products."""
    target = inputs.models.teacher
    forward = cost.forward_pass_bytes(target, tokens, inputs.bytes_each)
    backward = cost.backward_pass_bytes(target, tokens, inputs.bytes_each)
    return forward + backward + cost.logit_bytes(target, work.prompts * work.answers)


def _memory(inputs: PlanInputs, work: _Work, tokens: float) -> dict[str, float]:
    """Compute the memory of one GPU by part, in GiB.

    Args:
        inputs: models and engine.
        work: what one rank runs.
        tokens: number of tokens that the target's layers see.
    """
    engine = inputs.config.engine
    each = inputs.bytes_each
    target = inputs.models.teacher
    in_a_layer = cost.activation_elements(target, trained=False)
    # With checkpointing, only the input of each layer is kept, and one layer is recomputed.
    kept = target.width if engine.activation_checkpointing else in_a_layer
    # If the vocabulary is compared, logits of the unprompted target and of the student also exist.
    copies = 0
    for classes in work.by_classes:
        copies += _LOGIT_COPIES_OF_CLASSES if classes else _LOGIT_COPIES_OF_VOCABULARY
    memory = frozen_memory(target, engine, inputs.group, each)
    memory["student_weights"] = inputs.models.student.parameters * each / GIB
    memory["activations"] = (len(target.layers) * kept + in_a_layer) * tokens * each / GIB
    memory["logits"] = copies * work.answers * target.vocabulary * 4 / GIB
    return memory
