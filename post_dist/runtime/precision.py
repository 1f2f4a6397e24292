"""Numeric precision: choose and check it for a device, and map it to a dtype of torch."""

import logging

import torch

from post_dist.config.precision import Precision
from post_dist.config.schema import Engine
from post_dist.conflicts import Conflict

log = logging.getLogger(__name__)

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def choose_precision(engine: Engine, device: torch.device) -> Precision:
    """Resolve `engine.precision` for a device; `auto` is bf16 on devices with bf16 instructions.

    `precision_conflicts` says which precisions a device does not support.
    """
    if engine.precision != "auto":
        return engine.precision
    has_bf16 = _has_bf16_instructions(device)
    precision: Precision = "bf16" if has_bf16 else "fp32"
    verb = "has" if has_bf16 else "lacks"
    log.info("precision %s: this %s %s bf16 instructions", precision, device.type, verb)
    return precision


def precision_conflicts(engine: Engine, device: str) -> list[Conflict]:
    """Check that a device supports `engine.precision`. A stage without shards needs no more."""
    if engine.precision != "fp16" or device != "cpu":
        return []
    return [
        Conflict(
            "engine.precision: fp16 does not run on a CPU",
            "set engine.precision to auto, bf16 or fp32",
        )
    ]


def _has_bf16_instructions(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # Without these instructions a CPU emulates bf16, which is slower than fp32.
    instructions = torch.cpu.get_capabilities()
    return bool(instructions.get("avx512_bf16") or instructions.get("amx_bf16"))
