"""What a GPU holds, in GiB by part, and when: some parts are there only at one moment of a step, and the fullest moment counts."""

from collections.abc import Mapping, Sequence

from post_dist.config.deepspeed import bucket_elements, preset
from post_dist.config.schema import Engine
from post_dist.losses.pieces import LOGITS_AT_ONCE
from post_dist.models.size import ModelSize
from post_dist.planning import cost

GIB = 2**30
GATHERED = ("gathered_weights", "weights_on_their_way")
"""The parts that `frozen_memory` holds during a forward pass alone."""


def frozen_memory(size: ModelSize, engine: Engine, group: int, bytes_each: int) -> dict[str, float]:
    """A frozen model's shard, unless it is offloaded; and the weights that DeepSpeed brings and keeps whole, and copies of those coming."""
    offloaded = engine.offload != "none"
    held = {"frozen_weights": 0.0 if offloaded else cost.shard_bytes(size, group, bytes_each) / GIB}
    if group == 1 and not offloaded:
        return held
    settings = preset("frozen_zero3")["zero_optimization"]
    whole = min(size.parameters, settings["stage3_max_live_parameters"] + size.largest_layer)
    coming = min(size.parameters, settings["stage3_prefetch_bucket_size"])
    return held | dict(
        zip(GATHERED, (whole * bytes_each / GIB, coming * bytes_each / GIB), strict=True)
    )


def student_memory(
    engine: Engine, student: ModelSize, trained: int, *, ranks: int, tokens: float, bytes_each: int
) -> dict[str, float]:
    """Of the model that is trained: weights, gradients and optimizer by the ZeRO stage, activations of trained layers, logits of one piece.

    Args:
        engine: its ZeRO stage, checkpointing and offload.
        student: above its frozen layers.
        trained: elements.
        ranks: all.
        tokens: of one micro-batch on one rank.
        bytes_each: of a weight.
    """
    stage = engine.zero_stage
    over = {
        "weights": ranks if stage == 3 else 1,
        "gradients": ranks if stage >= 2 else 1,
        "optimizer": ranks if stage >= 1 else 1,
    }
    kept = student.width if engine.activation_checkpointing else cost.activation_elements(student)
    # DeepSpeed keeps no copy of fp32 weights where it shards nothing.
    of_adam = cost.ADAM_BYTES - 4 * (bytes_each == 4 and stage == 0)
    held = {
        "student_weights": student.parameters * bytes_each / over["weights"],
        "student_gathered": student.parameters * bytes_each * (stage == 3 and ranks > 1),
        "student_gradients": trained * bytes_each / over["gradients"],
        "gradient_bucket": bucket_elements(trained) * bytes_each * (stage >= 1),
        "student_optimizer": 0.0
        if engine.offload_optimizer
        else of_adam * trained / over["optimizer"],
        "activations": (len(student.layers) * kept + cost.activation_elements(student))
        * tokens
        * bytes_each,
        "logits": 2 * min(LOGITS_AT_ONCE, tokens * student.vocabulary) * 4,
    }
    return {part: size / GIB for part, size in held.items()}


def fullest(memory: Mapping[str, float], moments: Sequence[Sequence[str]]) -> float:
    """What is held at the fullest of some moments, each given by the parts that are not always there."""
    passing = {part for moment in moments for part in moment}
    always = sum(gib for part, gib in memory.items() if part not in passing)
    return always + max(
        (sum(memory.get(part, 0.0) for part in moment) for moment in moments), default=0.0
    )
