"""Cost of a step: operations, bytes that ranks receive, and passes over memory.

Every function here depends on sizes alone. Tests compare operations with torch's own counter, and
bytes with every collective that two and four ranks call.

Shapes: B sequences or examples, T tokens of one, n prompt tokens, d width, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from post_dist.models.size import LayerSize, ModelSize

ADAM_BYTES = 12
"""Bytes of a trained weight in the optimizer: a copy and two moments, each in fp32 (ZeRO,
arXiv 1910.02054, section 3). A checkpoint holds exactly these."""


@dataclass(frozen=True)
class Sharding:
    """The division of the weights of a step among the ranks.

    Attributes:
        ranks: number of all ranks.
        group: number of ranks that share one copy of a frozen model.
        bytes_each: bytes of one weight.
    """

    ranks: int
    group: int
    bytes_each: float


# ----------------------------------------------------------------------------------- operations


def attention_flops(size: ModelSize, queries: float, keys: float) -> float:
    """Count the operations of attention: two products of each query with each key, in all heads.

    Each product is a multiplication and an addition. The first one is as wide as the queries, and
    the second one as wide as the outputs.
    """
    # The softmax is left out, as it is by torch's own counter.
    return 2 * queries * keys * (size.attention.query + size.attention.output)


def layer_flops(size: ModelSize, layer: LayerSize, tokens: float, keys: float) -> float:
    """Count the operations of a layer's forward pass: two for each weight and token, and attention.

    Masked positions count too, because the kernels compute them.

    Args:
        size: the model.
        layer: one of its layers.
        tokens: tokens that pass through the layer.
        keys: positions that each token attends to.
    """
    return 2 * (layer.attention + layer.mlp) * tokens + attention_flops(size, tokens, keys)


def forward_flops(size: ModelSize, sequences: float, length: float) -> float:
    """Count the operations of a forward pass over whole sequences, without the head."""
    return sum(layer_flops(size, layer, sequences * length, length) for layer in size.layers)


def head_flops(size: ModelSize, positions: float) -> float:
    """Count the operations from hidden states to the logits of the whole vocabulary."""
    return 2 * size.width * size.vocabulary * positions


def distill_flops(
    teacher: ModelSize,
    student: ModelSize,
    sequences: float,
    length: float,
    *,
    freeze_head: bool = True,
) -> dict[str, float]:
    """Count the operations of one rank's step of distillation.

    The backward pass of a trained layer costs two forward passes: the gradients of its input and of
    its weights. This holds for the lowest layer too, because its norm is trained. The loss knows
    the gradient of the logits in closed form. So the head takes one more product, for the gradient
    of its input. A trained head takes another one, for the gradient of its weights.

    Args:
        teacher: runs forward, with its head.
        student: the student above its frozen layers, which run in the teacher.
        sequences: sequences of this rank.
        length: tokens of each sequence.
        freeze_head: whether the student's head is frozen.

    Returns:
        Operations of `teacher`, `student_forward` and `student_backward`.
    """
    tokens = sequences * length
    # The teacher's logits are computed from its hidden states, so its head counts too.
    teacher_forward = forward_flops(teacher, sequences, length) + head_flops(teacher, tokens)
    forward = forward_flops(student, sequences, length)
    head = head_flops(student, tokens)
    head_products = 1 if freeze_head else 2
    return {
        "teacher": teacher_forward,
        "student_forward": forward + head,
        "student_backward": 2 * forward + head_products * head,
    }


@dataclass(frozen=True)
class TransferBatch:
    """The examples of one prompt in a rank's step of the transfer.

    Attributes:
        examples: number B of examples.
        length: tokens T of each example.
        prompt: tokens n of the prompt.
        responses: tokens of one response, each of which has logits. 0 for a task with classes,
            where an example has one answer.
    """

    examples: float
    length: float
    prompt: float
    responses: int = 0

    def repeats_prompt(self, target: ModelSize) -> bool:
        """Return whether each example runs the prompt itself, instead of sharing one run of it."""
        return bool(self.responses) or not target.shares_prompt

    def tokens(self, target: ModelSize) -> float:
        """Count the tokens that the target's layers see.

        Returns:
            n + B T where all examples share one run of the prompt, or B (n + T).
        """
        if self.repeats_prompt(target):
            return self.examples * (self.prompt + self.length)
        return self.prompt + self.examples * self.length


def transfer_flops(
    target: ModelSize,
    student: ModelSize,
    batch: TransferBatch,
    *,
    by_classes: bool,
    upper_layers: int | None = None,
) -> dict[str, float]:
    """Count the operations of one rank's step of the transfer of one prompt.

    If examples share the prompt, the layers see n + B T tokens. The queries and the MLP of the last
    layer see only the B answers. Otherwise all layers see B (n + T) tokens. The backward pass runs
    through the layers once, for gradients of the input only: no weight is trained.

    Args:
        target: the large model.
        student: its head turns two cached hidden states into logits of the whole vocabulary.
        batch: the examples.
        by_classes: whether class scores are compared. Otherwise the logits of the unprompted target
            are computed too, in one product with those of the prompted one.
        upper_layers: number of layers, from the top, that the backward pass runs through; None for
            all of them.

    Returns:
        Operations of `forward` and `backward`.
    """
    # Each example has one answer, or one at each token of its response.
    answers = batch.examples * (batch.responses or 1)
    head = head_flops(target, answers if by_classes else 2 * answers)
    # Class scores of the student are computed once, before the steps.
    constants = 0.0 if by_classes else head_flops(student, 2 * answers)
    products, attention = _products_and_attention(target, batch, target.layers)
    passed = target.upper_layers(upper_layers)
    passed_products, passed_attention = _products_and_attention(target, batch, passed)
    return {
        "forward": products + attention + head + constants,
        "backward": passed_products + 2 * passed_attention + head,
    }


def _products_and_attention(
    target: ModelSize, batch: TransferBatch, layers: Sequence[LayerSize]
) -> tuple[float, float]:
    """Count the operations of the last layers of the target in one forward pass.

    Attention is counted apart from the other products, because its backward pass costs twice as
    much: each of its products has two inputs with a gradient.
    """
    tokens = batch.tokens(target)
    keys = batch.prompt + batch.length
    if batch.repeats_prompt(target):
        attention = len(layers) * attention_flops(target, tokens, keys)
        whole = sum(layer_flops(target, layer, tokens, keys) for layer in layers)
        return whole - attention, attention

    # All tokens pass through the lower layers and need keys and values in the last one.
    *lower, last = layers
    lower_weights = sum(layer.attention + layer.mlp for layer in lower)
    of_last = last.attention * tokens + last.mlp * batch.examples
    # An example attends to the prompt and to itself, the prompt to itself alone.
    of_examples = attention_flops(target, batch.examples * batch.length, keys)
    of_prompt = attention_flops(target, batch.prompt, batch.prompt)
    of_answers = attention_flops(target, batch.examples, keys)
    return (
        2 * lower_weights * tokens + 2 * of_last,
        len(lower) * (of_examples + of_prompt) + of_answers,
    )


# ------------------------------------------------------------------------ bytes that ranks receive


def gathered_bytes(weights: Iterable[int], group: int, bytes_each: float) -> float:
    """Compute the bytes that a rank receives to gather sharded weights: all shards but its own.

    Args:
        weights: number of elements of each weight. Shards are rounded up to equal sizes.
        group: number of ranks that hold the shards.
        bytes_each: bytes of one element.
    """
    # ZeRO-3 pads each weight, so that all ranks hold shards of equal size.
    shards = sum(-(-numel // group) for numel in weights)
    return shards * (group - 1) * bytes_each


def reduced_bytes(numel: float, ranks: int, bytes_each: float) -> float:
    """Compute the bytes that a rank receives in an all-reduce.

    On a ring, the tensor is sent twice, without the rank's own part (Patarasuk and Yuan 2009).
    """
    return 2 * (ranks - 1) / ranks * numel * bytes_each


def distill_bytes(
    teacher: ModelSize,
    student: ModelSize,
    sharding: Sharding,
    *,
    trained: int,
    zero_stage: int,
    passes: int,
    teacher_passes: int,
) -> dict[str, float]:
    """Compute the bytes that a rank receives in a step of distillation.

    Args:
        teacher: gathered in each of its passes, without its head: the student has the same head.
        student: the student above its frozen layers. ZeRO-3 gathers it once per pass: the backward
            pass uses what the forward pass has gathered, up to 1e9 weights.
        sharding: how weights are spread over the ranks.
        trained: number of elements that are trained.
        zero_stage: ZeRO stage of the student.
        passes: number of micro-batches.
        teacher_passes: number of the teacher's passes; one may serve several micro-batches.

    Returns:
        Bytes to `gather` weights and to `reduce` gradients.
    """
    each = sharding.bytes_each
    ranks = sharding.ranks
    trunk = gathered_bytes(teacher.without_one_table.weights, sharding.group, each)
    gather = teacher_passes * trunk
    reduce = reduced_bytes(trained, ranks, each)
    # ZeRO-2 reduces in each pass, because a rank keeps no other gradients than its own.
    if zero_stage == 2:
        reduce *= passes
    # ZeRO-1 and 2: each rank steps its part of the weights, and then all of them are exchanged.
    if zero_stage in (1, 2):
        gather += gathered_bytes([trained], ranks, each)
    # ZeRO-3: weights are gathered for each pass, and gradients are reduced to their owner alone.
    if zero_stage == 3:
        gather += passes * gathered_bytes(student.weights, ranks, each)
        reduce = passes * (ranks - 1) / ranks * trained * each
    return {"gather": gather, "reduce": reduce}


def transfer_bytes(
    target: ModelSize, trained: int, sharding: Sharding, upper_layers: int | None = None
) -> dict[str, float]:
    """Compute the bytes that a rank receives in a step of the transfer.

    The target is gathered once for the forward pass. The backward pass gathers it, without its
    embeddings, as far down as it runs. Gradients are reduced in fp32.

    Args:
        target: the large model.
        trained: number of trained values, of all prompts together or of a LoRA.
        sharding: how weights are spread over the ranks.
        upper_layers: number of layers, from the top, that the backward pass runs through; None for
            all of them.

    Returns:
        Bytes to `gather` weights and to `reduce` gradients.
    """
    group = sharding.group
    forward = gathered_bytes(target.weights, group, sharding.bytes_each)
    upper = replace(target.without_one_table, layers=target.upper_layers(upper_layers))
    backward = gathered_bytes(upper.weights, group, sharding.bytes_each)
    reduce = reduced_bytes(trained, sharding.ranks, 4)
    return {"gather": forward + backward, "reduce": reduce}


# ------------------------------------------------------------------------------ passes over memory


_FORWARD_PASSES = 2
"""Passes over a layer's activations: they are written, and the next operation reads them."""
_BACKWARD_PASSES = 3
"""Passes in the backward pass: activations are read, and their gradient is written and read."""
_LOGIT_PASSES = 8
"""Passes over the fp32 logits: they are written and read for the maximum, the sum and the
divergence, and so is their gradient, in part for both models."""


def activation_elements(size: ModelSize, *, trained: bool = True) -> float:
    """Count the elements that a layer keeps for each token for its backward pass.

    These are the inputs of norms, projections and products, and the two factors of the gate (see
    arXiv 2205.05198, section 4.1). Attention is fused and keeps no [T, T]. A layer that is not
    `trained` does not keep the inputs of its products: only gradients of weights need them.
    """
    states = size.attention
    of_attention = states.query + states.key + states.value + states.output
    kept = 6 * size.width + of_attention + 4 * size.mlp_width
    if trained:
        return kept
    # The inputs of two projections and of the last product of the MLP.
    return kept - 2 * size.width - size.mlp_width


def forward_pass_bytes(size: ModelSize, tokens: float, bytes_each: float) -> float:
    """Compute the bytes that norms, rotations, gates and sums move in a forward pass."""
    return _FORWARD_PASSES * activation_elements(size) * len(size.layers) * tokens * bytes_each


def backward_pass_bytes(size: ModelSize, tokens: float, bytes_each: float) -> float:
    """Compute the bytes that norms, rotations, gates and sums move in a backward pass."""
    return _BACKWARD_PASSES * activation_elements(size) * len(size.layers) * tokens * bytes_each


def logit_bytes(size: ModelSize, positions: float) -> float:
    """Compute the bytes that the loss moves through memory for the logits of some positions."""
    return _LOGIT_PASSES * 4 * size.vocabulary * positions


def optimizer_bytes(numel: float, bytes_each: float) -> float:
    """Compute the bytes that Adam moves through memory to update some weights.

    For each weight it reads and writes three fp32 values, reads the gradient and writes the weight.
    """
    return (2 * ADAM_BYTES + 2 * bytes_each) * numel


# ------------------------------------------------------------------------------------------ memory


def shard_bytes(size: ModelSize, group: int, bytes_each: float) -> float:
    """Compute the bytes of one rank's shard of a model."""
    return sum(-(-numel // group) for numel in size.weights) * bytes_each
