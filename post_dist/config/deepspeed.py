"""The DeepSpeed settings of a run: a preset of `ds_configs/`, completed from the run file."""

import json
import math
from typing import Any

from post_dist.config.assets import asset
from post_dist.config.precision import Precision
from post_dist.config.schema import Engine

_SWAP_BLOCK = 1 << 16
"""Buffer sizes are multiples of this number of elements. It is a multiple of the page size to which
DeepSpeed pads each shard on disk."""

_SWAP_BUFFERS = 8
"""Number of shards that are copied between disk and memory at once."""

_LARGEST_BUCKET = 500_000_000
"""Maximum bucket size in elements; DeepSpeed's default. DeepSpeed allocates the whole bucket (1 GiB
in bf16) for any model."""


def preset(name: str) -> dict[str, Any]:
    """Return the contents of `ds_configs/NAME.json`."""
    settings: dict[str, Any] = json.loads(asset(f"ds_configs/{name}.json").read_text())
    return settings


def frozen_settings(engine: Engine, precision: Precision, largest_shard: int) -> dict[str, Any]:
    """Return the settings for a frozen large model: ZeRO-3 without an optimizer.

    Args:
        engine: the run file's section `engine`.
        precision: precision of the weights.
        largest_shard: number of elements in the largest shard of a weight. The buffers between disk
            and memory must have room for it.
    """
    settings = preset("frozen")
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
        engine: the run file's section `engine`, for ZeRO stage and optimizer offload.
        precision: precision of the forward and backward passes.
        trained: number of trained elements, which sets the size of the reduction bucket.
        micro_batch_size: number of sequences in one forward pass on one GPU.
        accumulation_steps: number of micro-batches in one step on one GPU.
        max_grad_norm: norm to which the gradient of a step is clipped.
    """
    settings = preset("train")
    zero = settings["zero_optimization"]
    zero["stage"] = engine.zero_stage
    zero["reduce_bucket_size"] = bucket_elements(trained)
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        # Otherwise DeepSpeed requires its own Adam, which it compiles at the first start.
        settings["zero_force_ds_cpu_optimizer"] = False
    settings["train_micro_batch_size_per_gpu"] = micro_batch_size
    settings["gradient_accumulation_steps"] = accumulation_steps
    settings["gradient_clipping"] = max_grad_norm
    return settings | _precision(precision)


def bucket_elements(trained: int) -> int:
    """Return the number of gradient elements that ZeRO reduces at once from one buffer."""
    return min(trained, _LARGEST_BUCKET)


def _precision(precision: Precision) -> dict[str, Any]:
    # DeepSpeed trains in fp32 unless another precision is enabled.
    if precision == "fp32":
        return {}
    return {precision: {"enabled": True}}
