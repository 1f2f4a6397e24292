"""What prompt, LoRA and prefix have in common in PEFT's files."""

from collections.abc import Mapping

PROMPT_EMBEDDINGS = "prompt_embeddings"
"""PEFT's name of the only tensor of a prompt [n, d] and of a prefix [n, 2 L h w]."""
NAMED_FIELDS: Mapping[str, type] = {
    "base_model_name_or_path": str,
    "inference_mode": bool,
    "peft_version": str,
    "task_type": str,
}
"""Fields of adapter_config.json that change no score, and their types."""
LAYER_LIMIT = 10_000
"""Number of layers that no known model reaches."""
VALUE_LIMIT = 1e4
"""Largest value of a LoRA or a prefix."""
