"""The plan of heads that are fitted on the target: passes over the public text, forward alone."""

from post_dist.data.order import rank_batches
from post_dist.planning import cost
from post_dist.planning.estimate import PartEstimate
from post_dist.planning.inputs import PlanInputs
from post_dist.planning.layout import fetched_bytes, nonzero
from post_dist.planning.memory import GIB, frozen_memory
from post_dist.stages.transfer.fitted_head import TEXTS_AT_ALL_LAYERS
from post_dist.stages.transfer.public_reading import INFERENCE_FACTOR


def plan_heads(inputs: PlanInputs) -> PartEstimate:
    """Estimate the passes of student and target over the public text. A step is a batch of one.

    A head more behind the same prompt runs no layer, so the number of heads does not count. Without
    `public_task.max_rows` the number of texts is not known, and the passes count as none.

    Args:
        inputs: run file, models and machine.
    """
    section = inputs.config.transfer
    machine = inputs.machine
    target = inputs.models.teacher
    # A rank's part of a batch that is trained on, times the factor of a forward pass.
    (own, *_) = rank_batches(range(section.batch_size), section.batch_size, 0, machine.ranks)
    examples = INFERENCE_FACTOR * len(own.rows)
    text, _ = inputs.text_lengths()
    length = inputs.config.tune.num_virtual_tokens + text

    flops = cost.forward_flops(target, examples, length) + cost.head_flops(target, examples)
    received = cost.gathered_bytes(target.weights, inputs.group, inputs.bytes_each)
    fetched = fetched_bytes(inputs, [target])
    compute = flops / inputs.flops_per_second
    gather = machine.collective_seconds(received, inputs.group, len(target.layers))
    fetch = fetched / machine.hardware.host_bytes_per_second()
    step = max(compute, fetch + gather) if inputs.overlap else compute + fetch + gather

    # The target reads all texts without the prompt and behind it. Of many texts, it reads some once
    # more, at all layers.
    texts = _texts(inputs)
    in_a_batch = examples * machine.ranks
    batches = 2 * -(-texts // in_a_batch)
    if texts > TEXTS_AT_ALL_LAYERS:
        batches += -(-TEXTS_AT_ALL_LAYERS // in_a_batch)
    of_student = cost.forward_flops(inputs.models.student, 2 * texts / machine.ranks, length)
    numbers = {
        "flops_per_gpu": {"forward": flops},
        "received_gib_per_gpu": {"gather": received / GIB} | nonzero(fetch=fetched / GIB),
        "seconds": {"compute": compute, "gather": gather} | nonzero(fetch=fetch),
        "step_seconds": step,
        "steps": batches,
        "samples_per_second": in_a_batch / step,
        "model_flops_utilisation": inputs.utilization(flops, step),
    }
    return PartEstimate(
        seconds=batches * step + of_student / inputs.flops_per_second,
        memory_gib=_memory(inputs, examples, length),
        numbers=numbers,
    )


def _texts(inputs: PlanInputs) -> int:
    """Return the largest number of public texts; 0 if the run file does not limit it."""
    task = inputs.config.public_task
    return 0 if task is None or task.max_rows is None else task.max_rows


def _memory(inputs: PlanInputs, examples: int, length: int) -> dict[str, float]:
    """Compute the memory of one GPU by part, in GiB.

    Args:
        inputs: models and engine.
        examples: number of texts of a rank in a batch.
        length: maximum number of tokens of a text with the prompt.
    """
    each = inputs.bytes_each
    target = inputs.models.teacher
    memory = frozen_memory(target, inputs.config.engine, inputs.group, each)
    memory["student_weights"] = inputs.models.student.parameters * each / GIB
    # Without gradients, only the activations of one layer exist.
    in_a_layer = cost.activation_elements(target, trained=False)
    memory["activations"] = in_a_layer * examples * length * each / GIB
    memory["logits"] = examples * target.vocabulary * 4 / GIB
    return memory
