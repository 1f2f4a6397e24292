"""The DeepSpeed settings of a run: a preset of `ds_configs/` with batch, precision, clipping and folders filled in."""

import json
from typing import Any

from post_dist.config.assets import asset
from post_dist.config.precision import Precision
from post_dist.config.schema import Engine

_SWAP_BLOCK = 1 << 16
"""Elements; DeepSpeed fills each shard up to whole pages of the disk."""
_MOST_REDUCED_AT_ONCE = 500_000_000
"""Elements; DeepSpeed's own default, for which it makes room however few are trained: a GiB in bf16."""


def preset(name: str) -> dict[str, Any]:
    """The contents of `ds_configs/NAME.json`."""
    settings: dict[str, Any] = json.loads(asset(f"ds_configs/{name}.json").read_text())
    return settings


def frozen_settings(engine: Engine, precision: Precision, largest_shard: int) -> dict[str, Any]:
    """ZeRO-3 without an optimizer, for the teacher and the transfer target.

    Args:
        engine: the layout.
        precision: of the weights.
        largest_shard: elements of the largest weight's shard, for which the buffers between disk and memory must have room.
    """
    settings = preset(
        "frozen_zero3" if engine.offload == "none" else f"frozen_zero3_{engine.offload}"
    )
    zero = settings["zero_optimization"]
    zero["zero_quantized_weights"] = engine.quantized_gathers
    if engine.nvme_folder is not None:
        blocks = -(-largest_shard // _SWAP_BLOCK)
        zero["offload_param"] |= {
            "nvme_path": str(engine.nvme_folder),
            "buffer_size": blocks * _SWAP_BLOCK,
        }
    return (
        settings | {"train_micro_batch_size_per_gpu": 1} | _precision(precision)
    )  # DeepSpeed wants a batch, and no engine reads it


def training_settings(
    engine: Engine,
    precision: Precision,
    *,
    trained: int,
    micro_batch_size: int,
    accumulation_steps: int,
    max_grad_norm: float,
) -> dict[str, Any]:
    """The student's engine: a ZeRO stage with batch and gradient clipping, and a bucket for so many trained elements."""
    settings = preset(f"train_zero{engine.zero_stage}{'_cpu' if engine.offload_optimizer else ''}")
    settings["zero_optimization"]["reduce_bucket_size"] = bucket_elements(trained)
    return (
        settings
        | {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation_steps,
            "gradient_clipping": max_grad_norm,
        }
        | _precision(precision)
    )


def bucket_elements(trained: int) -> int:
    """How many elements' gradients ZeRO gathers in a buffer of its own and reduces at once."""
    return min(trained, _MOST_REDUCED_AT_ONCE)


def _precision(precision: Precision) -> dict[str, Any]:
    return {} if precision == "fp32" else {precision: {"enabled": True}}
