"""The run file's section `engine.deepspeed`: settings that pass through to DeepSpeed."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from post_dist.config.sections import Section

_OUR_FIELDS: Mapping[str, str] = {
    "train_batch_size": "distill.batch_size",
    "train_micro_batch_size_per_gpu": "distill.micro_batch_size_per_gpu",
    "gradient_accumulation_steps": "distill.batch_size and distill.micro_batch_size_per_gpu",
    "gradient_clipping": "distill.max_grad_norm",
    "optimizer": "distill.learning_rate",
    "scheduler": "distill.warmup_share",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "data_types": "engine.precision",
    "activation_checkpointing": "engine.activation_checkpointing",
    "checkpoint": "distill.checkpoint_every_steps",
    "tensorboard": "tracking.to",
    "wandb": "tracking.to",
    "csv_monitor": "tracking.to",
    "comet": "tracking.to",
}
"""The field of the run file for each setting of DeepSpeed that post_dist makes from it."""

_OUR_ZERO_FIELDS: Mapping[str, str] = {
    "stage": "engine.zero_stage",
    "offload_param": "engine.offload",
    "cpu_offload_param": "engine.offload",
    "cpu_offload_use_pin_memory": "engine.offload",
    "offload_optimizer": "engine.offload_optimizer",
    "cpu_offload": "engine.offload_optimizer",
    "zero_quantized_weights": "engine.quantized_gathers",
    "zero_quantized_nontrainable_weights": "engine.quantized_gathers",
    "zero_hpz_partition_size": "engine.shard_group",
    # Without the norm, nothing would be clipped.
    "compute_grad_norm": "distill.max_grad_norm",
}
"""The field of the run file for each setting of `zero_optimization` that post_dist makes."""


def _check_not_ours(given: Mapping[Any, Any], ours: Mapping[str, str]) -> None:
    """Refuse the settings that post_dist makes from fields of the run file."""
    found = [f"set {ours[key]} in place of {key}" for key in given if key in ours]
    if found:
        raise ValueError("; ".join(found))


def _check_zero(given: Any) -> Any:
    # pydantic reports another type itself.
    if not isinstance(given, dict):
        return given
    _check_not_ours(given, _OUR_ZERO_FIELDS)
    for key, value in given.items():
        if not isinstance(value, bool | int | float):
            raise ValueError(f"{key} holds neither a number, true nor false")
    return given


ZeroSettings = Annotated[dict[str, bool | int | float], BeforeValidator(_check_zero)]


class DeepSpeedSettings(Section):
    """Further settings of DeepSpeed, under its own names. They reach the engines of all models.

    A setting that another field of the run file makes is refused. Any of these may change results,
    so a run does not resume with others.
    """

    zero_optimization: ZeroSettings = Field(default_factory=dict)
    """Settings of ZeRO, such as `overlap_comm` or `stage3_prefetch_bucket_size`: numbers, true or
    false. DeepSpeed itself checks their names and values."""
    communication_data_type: Literal["fp16", "bf16", "fp32"] | None = None
    """Precision in which the student's gradients are reduced. Default: DeepSpeed chooses."""

    @model_validator(mode="before")
    @classmethod
    def _leaves_ours_alone(cls, fields: Any) -> Any:
        if isinstance(fields, dict):
            _check_not_ours(fields, _OUR_FIELDS)
        return fields
