"""The DeepSpeed settings of a run: a preset of `ds_configs/` with batch, precision and clipping filled in."""

import json
from typing import Any, Literal

from post_dist.config.assets import asset
from post_dist.config.schema import Distill

Precision = Literal["fp32", "bf16", "fp16"]


def preset(name: str) -> dict[str, Any]:
    """The contents of `ds_configs/NAME.json`."""
    settings: dict[str, Any] = json.loads(asset(f"ds_configs/{name}.json").read_text())
    return settings


def frozen_settings(precision: Precision, micro_batch_size: int) -> dict[str, Any]:
    """ZeRO-3 without an optimizer, for the teacher and the transfer target."""
    return preset("frozen_zero3") | {"train_micro_batch_size_per_gpu": micro_batch_size} | _precision(precision)


def training_settings(zero_stage: int, precision: Precision, distill: Distill) -> dict[str, Any]:
    """The student's engine: a ZeRO stage with the batch and gradient clipping of the run file."""
    return (
        preset(f"train_zero{zero_stage}")
        | {
            "train_micro_batch_size_per_gpu": distill.micro_batch_size_per_gpu,
            "gradient_accumulation_steps": distill.gradient_accumulation_steps,
            "gradient_clipping": distill.max_grad_norm,
        }
        | _precision(precision)
    )


def _precision(precision: Precision) -> dict[str, Any]:
    return {} if precision == "fp32" else {precision: {"enabled": True}}
