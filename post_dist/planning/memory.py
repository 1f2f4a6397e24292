"""Memory of a GPU by part, in GiB.

Some parts exist only at some moments of a step. The run fits if its fullest moment fits.
"""

from collections.abc import Mapping, Sequence

from post_dist.config.deepspeed import preset, reduce_buffers
from post_dist.config.schema import Engine
from post_dist.losses.pieces import LOGITS_ON_GPU
from post_dist.models.size import ModelSize
from post_dist.planning import cost

GIB = 2**30
GATHERED = ("gathered_weights", "weights_on_their_way")
"""The parts of `frozen_memory` that exist only during a forward pass."""


def frozen_memory(size: ModelSize, engine: Engine, group: int, bytes_each: int) -> dict[str, float]:
    """Compute the memory of a frozen model on one rank.

    Args:
        size: the model.
        engine: the run file's section `engine`, which may offload shards.
        group: number of ranks that share one copy of the model.
        bytes_each: bytes of one weight.

    Returns:
        GiB of the shard. A sharded model adds the weights that DeepSpeed gathers and keeps whole,
        and copies of the weights that it prefetches.
    """
    # An offloaded shard is in host memory or on disk between two passes.
    offloaded = engine.offload != "none"
    shard = 0.0 if offloaded else cost.shard_bytes(size, group, bytes_each)
    held = {"frozen_weights": shard / GIB}
    # With a whole copy on each rank, DeepSpeed is not used, so nothing is gathered or prefetched.
    if group == 1 and not offloaded:
        return held
    # DeepSpeed keeps up to `max_live` gathered weights beside the layer that runs.
    settings = preset("frozen", engine)["zero_optimization"]
    whole = min(size.parameters, settings["stage3_max_live_parameters"] + size.largest_layer)
    prefetched = min(size.parameters, settings["stage3_prefetch_bucket_size"])
    gathered = (whole * bytes_each / GIB, prefetched * bytes_each / GIB)
    return held | dict(zip(GATHERED, gathered, strict=True))


def student_memory(
    engine: Engine, student: ModelSize, trained: int, *, ranks: int, tokens: float, bytes_each: int
) -> dict[str, float]:
    """Compute the memory of the student that is trained.

    Args:
        engine: gives ZeRO stage, activation checkpointing and offload of the optimizer.
        student: the student above its frozen layers.
        trained: number of elements that are trained.
        ranks: number of all ranks.
        tokens: tokens of one micro-batch on one rank.
        bytes_each: bytes of one weight.

    Returns:
        GiB of weights, gradients, optimizer, activations, and of the logits of one piece.
    """
    # ZeRO-1 shards the optimizer, ZeRO-2 also the gradients, ZeRO-3 also the weights.
    stage = engine.zero_stage
    optimizer_shards = gradient_shards = weight_shards = 1
    if stage >= 1:
        optimizer_shards = ranks
    if stage >= 2:
        gradient_shards = ranks
    if stage == 3:
        weight_shards = ranks

    # With checkpointing, only the input of each layer is kept, and one layer is recomputed.
    in_a_layer = cost.activation_elements(student)
    kept = student.width if engine.activation_checkpointing else in_a_layer
    activations = (len(student.layers) * kept + in_a_layer) * tokens * bytes_each

    # At ZeRO-0 in fp32, DeepSpeed keeps no second copy of the weights.
    of_adam = cost.ADAM_BYTES - 4 * (bytes_each == 4 and stage == 0)
    optimizer = 0.0 if engine.offload_optimizer else of_adam * trained / optimizer_shards

    buffers = reduce_buffers(engine, trained)
    # ZeRO-3 gathers the whole student for a pass (see `cost.distill_bytes`).
    whole = student.parameters * bytes_each
    held = {
        "student_weights": whole / weight_shards,
        "student_gathered": whole * (stage == 3 and ranks > 1),
        "student_gradients": trained * bytes_each / gradient_shards,
        "gradient_bucket": buffers.count * buffers.elements * bytes_each * (stage >= 1),
        "student_optimizer": optimizer,
        "activations": activations,
        "logits": 2 * min(LOGITS_ON_GPU, tokens * student.vocabulary) * 4,
    }
    return {part: size / GIB for part, size in held.items()}


def fullest(memory: Mapping[str, float], moments: Sequence[Sequence[str]]) -> float:
    """Compute the memory at the fullest moment of a step.

    Args:
        memory: GiB of each part.
        moments: for each moment, the parts that exist then. A part that is in no moment always
            exists.
    """
    # Parts that are in no moment exist all the time.
    passing = {part for moment in moments for part in moment}
    always = 0.0
    for part, gib in memory.items():
        if part not in passing:
            always += gib
    at_moments = [sum(memory.get(part, 0.0) for part in moment) for moment in moments]
    return always + max(at_moments, default=0.0)
