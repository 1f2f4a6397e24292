"""The plan of the warm start: a public prompt that is trained on the student, on all ranks."""

from post_dist.config.schema import RunConfig
from post_dist.config.stages import WarmStart
from post_dist.data.order import rank_batches
from post_dist.planning import cost
from post_dist.planning.estimate import StageEstimate
from post_dist.planning.inputs import PlanInputs
from post_dist.planning.layout import group_numbers, idle_conflicts, offloaded_bytes
from post_dist.planning.memory import GATHERED, GIB, frozen_memory
from post_dist.stages.warm_start.conflicts import conflicts

_TEACHER_PARTS = ("frozen_weights", *GATHERED)
_STUDENT_PARTS = ("student_weights", "activations", "logits")


def plan_warm_start(inputs: PlanInputs, section: WarmStart) -> StageEstimate:
    """Estimate the training of the public prompt.

    The passes over the public text before it are not counted: the run file does not say how many
    texts there are.

    Args:
        inputs: run file, models and machine.
        section: the run file's section `warm_start`.
    """
    machine = inputs.machine
    student = inputs.models.student
    examples = _examples_of_a_rank(section, machine.ranks)
    length = section.num_virtual_tokens + _text_length(inputs.config)
    # No weight is trained, so backward costs one forward.
    flops = 2 * cost.forward_flops(student, examples, length)
    flops += 2 * cost.head_flops(student, examples)
    compute = flops / inputs.flops_per_second
    reduced = cost.reduced_bytes(section.num_virtual_tokens * student.width, machine.ranks, 4)
    # The gradient of the prompt is complete only at the end, so nothing hides its reduction.
    reduce = machine.collective_seconds(reduced, machine.ranks, 1)
    step_seconds = compute + reduce
    found = conflicts(inputs.config, student.facts, inputs.models.teacher.facts, machine.layout)
    return StageEstimate(
        stage="warm_start",
        ranks=machine.ranks,
        hours=section.steps * step_seconds / 3600,
        memory_gib=_memory(inputs, examples, length),
        numbers={
            "flops_per_gpu": {"forward_and_backward": flops},
            "received_gib_per_gpu": {"reduce": reduced / GIB},
            "seconds": {"compute": compute, "reduce": reduce},
            "step_seconds": step_seconds,
            "steps": section.steps,
            "prompts": 1,
            "shard_group": group_numbers(inputs),
        },
        conflicts=[*found, *idle_conflicts("warm_start", section.batch_size, machine.ranks)],
        moments=[_TEACHER_PARTS, _STUDENT_PARTS],
        host_bytes=offloaded_bytes(inputs),
    )


def _examples_of_a_rank(section: WarmStart, ranks: int) -> int:
    """Return the number of texts of a step on the rank that has most of them."""
    size = section.batch_size
    (own,) = rank_batches(range(size), size, 0, ranks)
    return len(own.rows)


def _text_length(config: RunConfig) -> int:
    """Return the maximum number of tokens of a public text."""
    task = config.public_task
    return 128 if task is None else task.max_length


def _memory(inputs: PlanInputs, examples: int, length: int) -> dict[str, float]:
    """Compute the memory of one GPU by part, in GiB.

    The teacher is in memory for the zero-shot scores, and has left it when the student comes.

    Args:
        inputs: models and engine.
        examples: number of texts of a rank in a step.
        length: maximum number of tokens of a text with the prompt.
    """
    each = inputs.bytes_each
    student = inputs.models.student
    memory = frozen_memory(inputs.models.teacher, inputs.config.engine, inputs.group, each)
    kept = len(student.layers) * cost.activation_elements(student, trained=False)
    memory["student_weights"] = student.parameters * each / GIB
    memory["activations"] = kept * examples * length * each / GIB
    # Logits of the label words, their softmax and their gradient: the whole head is an upper bound.
    memory["logits"] = 3 * examples * student.vocabulary * 4 / GIB
    return memory
