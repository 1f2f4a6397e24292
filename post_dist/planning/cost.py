"""What a step costs: operations, bytes on the wires, and memory, as functions of sizes alone.

Each formula is checked by a test: operations against torch's counter, bytes against every collective that two ranks call.

Shapes: B rows or sequences, T tokens of one, n prompt tokens, d width, V vocabulary, G ranks of a shard group, W ranks.
"""

from collections.abc import Iterable

from post_dist.models.size import LayerSize, ModelSize

ADAM_BYTES = 12
"""Of a trained weight: a copy and two moments in fp32 (ZeRO, arXiv 1910.02054, section 3)."""


# ---------------------------------------------------------------------------------------------------------------- operations


def attention_flops(size: ModelSize, queries: float, keys: float) -> float:
    """Two products of every query with every key, all heads: 2 x 2 x queries x keys x width of all heads."""
    return 4 * queries * keys * size.attention_width


def layer_flops(size: ModelSize, layer: LayerSize, tokens: float, keys: float) -> float:
    """A layer's forward for tokens that each look at `keys` places: two operations for each weight, and attention.

    Masked places are counted: the kernels compute them.
    """
    return 2 * (layer.attention + layer.mlp) * tokens + attention_flops(size, tokens, keys)


def forward_flops(size: ModelSize, sequences: float, length: float) -> float:
    """The trunk's forward over whole sequences, without the head."""
    return sum(layer_flops(size, layer, sequences * length, length) for layer in size.layers)


def head_flops(size: ModelSize, positions: float) -> float:
    """From hidden states to the logits of the whole vocabulary."""
    return 2 * size.width * size.vocabulary * positions


def distill_flops(
    teacher: ModelSize,
    student: ModelSize,
    sequences: float,
    length: float,
    *,
    freeze_head: bool = True,
) -> dict[str, float]:
    """One rank's step of distillation on so many sequences.

    The backward pass of a trained layer is twice its forward: by what went in, and by its weights. (Of the lowest one too, for its norm is
    trained.) The head takes one more product by what went in, for the loss knows the gradient, and one by its weights if they are trained.

    Args:
        teacher: its forward, and its head's.
        student: above its frozen layers, which run in the teacher.
        sequences: of this rank.
        length: tokens of each.
        freeze_head: whether the student's is not trained.
    """
    tokens = sequences * length
    forward, head = forward_flops(student, sequences, length), head_flops(student, tokens)
    return {
        "teacher": forward_flops(teacher, sequences, length) + head_flops(teacher, tokens),
        "student_forward": forward + head,
        "student_backward": 2 * forward + (1 if freeze_head else 2) * head,
    }


def transfer_tokens(
    target: ModelSize, rows: float, length: float, prompt: float, *, responses: int
) -> float:
    """What the target's layers see in a step of the transfer for one prompt: it stands in front of all rows, or of each."""
    return (
        rows * (prompt + length)
        if _stands_in_each_row(target, responses)
        else prompt + rows * length
    )


def _stands_in_each_row(target: ModelSize, responses: int) -> bool:
    return bool(responses) or not target.shares_prompt


def transfer_flops(
    target: ModelSize,
    student: ModelSize,
    rows: float,
    length: float,
    prompt: float,
    *,
    by_classes: bool,
    responses: int = 0,
) -> dict[str, float]:
    """One rank's step of the transfer for one prompt, its rows behind it in one sequence where that can be.

    All layers then see n + B T tokens, the last one's MLP and queries only the answers; rows look at the prompt and themselves. Else all
    see B (n + T). Backward runs through the layers once, by what went in: no weight is trained.

    Args:
        target: the large model.
        student: its head makes the two constants of the whole vocabulary of what is kept.
        rows: B of this rank.
        length: T.
        prompt: n.
        by_classes: whether class scores are compared; else the unprompted target's logits are made too, in one product with the prompted.
        responses: tokens of one, each of which has logits; 0 for classes, where a row has one answer.
    """
    tokens = transfer_tokens(target, rows, length, prompt, responses=responses)
    answers = rows * (responses or 1)
    head = head_flops(target, answers if by_classes else 2 * answers)
    constants = 0.0 if by_classes else head_flops(student, 2 * answers)
    if _stands_in_each_row(target, responses):
        attention = len(target.layers) * attention_flops(target, tokens, prompt + length)
        products = forward_flops(target, rows, prompt + length) - attention
    else:
        *lower, last = target.layers
        products = (
            2 * sum(layer.attention + layer.mlp for layer in lower) * tokens
            + 2 * last.attention * tokens
            + 2 * last.mlp * rows
        )
        of_lower = attention_flops(target, rows * length, prompt + length) + attention_flops(
            target, prompt, prompt
        )
        attention = len(lower) * of_lower + attention_flops(target, rows, prompt + length)
    return {
        "forward": products + attention + head + constants,
        "backward": products + 2 * attention + head,
    }


# ---------------------------------------------------------------------------------------------------------------- bytes on the wires


def gathered_bytes(weights: Iterable[int], group: int, bytes_each: float) -> float:
    """What a rank takes in to have sharded weights whole: of each, all shards but its own; a shard is rounded up."""
    return sum(-(-numel // group) for numel in weights) * (group - 1) * bytes_each


def reduced_bytes(numel: float, ranks: int, bytes_each: float) -> float:
    """What a rank takes in by an all-reduce: a ring sends the size twice, less its own part (Patarasuk and Yuan 2009)."""
    return 2 * (ranks - 1) / ranks * numel * bytes_each


def distill_bytes(
    teacher: ModelSize,
    trained: int,
    student: ModelSize,
    *,
    zero_stage: int,
    group: int,
    ranks: int,
    passes: int,
    bytes_each: float,
) -> dict[str, float]:
    """What a rank takes in during a step of distillation.

    Args:
        teacher: its trunk is gathered once a pass; its head never, for the student's is the same.
        trained: elements that are trained.
        student: above its frozen layers. Gathered under ZeRO-3, once a pass: what is left of its own forward serves its backward up to
            1e9 weights.
        zero_stage: of the student.
        group: ranks that share the teacher.
        ranks: all.
        passes: micro-batches.
        bytes_each: of a weight.
    """
    trunk = gathered_bytes(teacher.without_one_table.weights, group, bytes_each)
    found = {"gather": passes * trunk, "reduce": reduced_bytes(trained, ranks, bytes_each)}
    if zero_stage in (1, 2):
        found["gather"] += gathered_bytes([trained], ranks, bytes_each)
    if zero_stage == 3:
        found["gather"] += passes * gathered_bytes(student.weights, ranks, bytes_each)
        found["reduce"] = passes * (ranks - 1) / ranks * trained * bytes_each
    return found


def transfer_bytes(
    target: ModelSize, prompt: int, *, group: int, ranks: int, bytes_each: float
) -> dict[str, float]:
    """What a rank takes in during a step of the transfer.

    The target once for the forward and, without its embedding, once for the backward; and the prompt's gradient, in fp32.
    """
    gather = gathered_bytes(target.weights, group, bytes_each) + gathered_bytes(
        target.without_one_table.weights, group, bytes_each
    )
    return {"gather": gather, "reduce": reduced_bytes(prompt * target.width, ranks, 4)}


# ---------------------------------------------------------------------------------------------------------------- passes over memory


_FORWARD_PASSES = 2
"""Over what a layer keeps: written, and read by what comes next."""
_BACKWARD_PASSES = 3
"""Read again, and its gradient written and read."""
_LOGIT_PASSES = 8
"""Over the fp32 logits: written, read for the maximum, the sum and the divergence, and their gradient, in part for both models."""


def activation_elements(size: ModelSize, *, trained: bool = True) -> float:
    """What a layer keeps of one token for its backward pass: what goes into norms, projections and products, and the gate's two factors.

    After arXiv 2205.05198, section 4.1, for fused attention, which keeps no [T, T]. What goes into the products of a layer that is not
    `trained` is not kept: only the gradient of their weights would need it.
    """
    kept = 6 * size.width + 2 * size.attention_width + 2 * size.kv_width + 4 * size.mlp_width
    return kept if trained else kept - 2 * size.width - size.mlp_width


def forward_pass_bytes(size: ModelSize, tokens: float, bytes_each: float) -> float:
    """What norms, rotations, gates and sums move through a GPU's memory in a forward pass."""
    return _FORWARD_PASSES * activation_elements(size) * len(size.layers) * tokens * bytes_each


def backward_pass_bytes(size: ModelSize, tokens: float, bytes_each: float) -> float:
    """The same for the backward pass."""
    return _BACKWARD_PASSES * activation_elements(size) * len(size.layers) * tokens * bytes_each


def logit_bytes(size: ModelSize, positions: float) -> float:
    """What the loss moves for the logits of so many positions."""
    return _LOGIT_PASSES * 4 * size.vocabulary * positions


def optimizer_bytes(numel: float, bytes_each: float) -> float:
    """What Adam moves for so many weights: three fp32 values both ways, the gradient in and the weight out."""
    return (2 * ADAM_BYTES + 2 * bytes_each) * numel


# ---------------------------------------------------------------------------------------------------------------- memory


def shard_bytes(size: ModelSize, group: int, bytes_each: float) -> float:
    """A rank's part of a sharded model."""
    return sum(-(-numel // group) for numel in size.weights) * bytes_each
