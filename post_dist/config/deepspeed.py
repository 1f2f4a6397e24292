"""The DeepSpeed settings of a run: a preset of `ds_configs/`, completed from the run file."""

import json
import math
from typing import Any, Literal, NamedTuple

from post_dist.config.assets import asset
from post_dist.config.precision import Precision
from post_dist.config.schema import Engine

_SWAP_BLOCK = 1 << 16
"""Buffer sizes are multiples of this number of elements. It is a multiple of the page size to which
DeepSpeed pads each shard on disk."""

_SWAP_BUFFERS = 8
"""Number of shards that are copied between disk and memory at once."""

_LARGEST_BUCKET = 500_000_000
"""Most elements of all reduction buffers together; DeepSpeed's default for one. DeepSpeed allocates
them whole (1 GiB in bf16) for any model."""


def preset(name: Literal["frozen", "train"], engine: Engine) -> dict[str, Any]:
    """Return `ds_configs/NAME.json` with the settings of `engine.deepspeed`."""
    settings: dict[str, Any] = json.loads(asset(f"ds_configs/{name}.json").read_text())
    if engine.deepspeed is None:
        return settings
    further = engine.deepspeed.model_dump(exclude_none=True)
    settings["zero_optimization"] |= further.pop("zero_optimization")
    return settings | further


def overlaps(engine: Engine) -> bool:
    """Return whether collectives may run beside computation, for frozen models and the student."""
    return bool(preset("train", engine)["zero_optimization"]["overlap_comm"])


def frozen_settings(engine: Engine, precision: Precision, largest_shard: int) -> dict[str, Any]:
    """Return the settings for a frozen large model: ZeRO-3 without an optimizer.

    Args:
        engine: the run file's section `engine`.
        precision: precision of the weights.
        largest_shard: number of elements in the largest shard of a weight. The buffers between disk
            and memory must have room for it.
    """
    settings = preset("frozen", engine)
    zero = settings["zero_optimization"]
    zero["zero_quantized_weights"] = engine.quantized_gathers
    if engine.offload != "none":
        zero["offload_param"] = {"device": engine.offload, "pin_memory": True}
    if engine.nvme_folder is not None:
        blocks = math.ceil(largest_shard / _SWAP_BLOCK)
        zero["offload_param"] |= {
            "nvme_path": str(engine.nvme_folder),
            "buffer_count": _SWAP_BUFFERS,
            "buffer_size": blocks * _SWAP_BLOCK,
        }
    # DeepSpeed demands a batch size, though an engine without an optimizer never reads it.
    settings["train_micro_batch_size_per_gpu"] = 1
    return settings | _precision(precision)


def training_settings(
    engine: Engine,
    precision: Precision,
    *,
    trained: int,
    micro_batch_size: int,
    accumulation_steps: int,
    max_grad_norm: float,
) -> dict[str, Any]:
    """Return the settings for the student's engine.

    Args:
        engine: the run file's section `engine`.
        precision: precision of the forward and backward passes.
        trained: number of trained elements, which sets the size of the reduction buffers.
        micro_batch_size: number of sequences in one forward pass on one GPU.
        accumulation_steps: number of micro-batches in one step on one GPU.
        max_grad_norm: norm to which the gradient of a step is clipped.
    """
    settings = preset("train", engine)
    zero = settings["zero_optimization"]
    zero["stage"] = engine.zero_stage
    zero["reduce_bucket_size"] = reduce_buffers(engine, trained).elements
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        # Otherwise DeepSpeed requires its own Adam, which it compiles at the first start.
        settings["zero_force_ds_cpu_optimizer"] = False
    settings["train_micro_batch_size_per_gpu"] = micro_batch_size
    settings["gradient_accumulation_steps"] = accumulation_steps
    settings["gradient_clipping"] = max_grad_norm
    return settings | _precision(precision)


class ReduceBuffers(NamedTuple):
    """The buffers from which ZeRO reduces gradients: their number, and the elements of each."""

    count: int
    elements: int


def reduce_buffers(engine: Engine, trained: int) -> ReduceBuffers:
    """Return the buffers of a student with this number of trained elements, for ZeRO-1 and up."""
    zero = preset("train", engine)["zero_optimization"]
    # With overlap, ZeRO-1 and 2 fill one buffer while they reduce the other.
    count = 2 if zero["overlap_comm"] and engine.zero_stage < 3 else 1
    together = min(trained, _LARGEST_BUCKET)
    return ReduceBuffers(count, zero.get("reduce_bucket_size", math.ceil(together / count)))


def _precision(precision: Precision) -> dict[str, Any]:
    # DeepSpeed trains in fp32 unless another precision is enabled.
    if precision == "fp32":
        return {}
    return {precision: {"enabled": True}}
