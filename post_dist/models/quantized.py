"""Models whose files hold quantized weights. post_dist loads them in the precision of the run."""

from pathlib import Path

from transformers import PretrainedConfig
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

from post_dist.errors import InputError

_DEQUANTIZED = ("fp8", "mxfp4")
"""Formats that transformers can convert while it loads a model: DeepSeek-V3's, and GPT-OSS's."""


def dequantizer(folder: Path, config: PretrainedConfig) -> HfQuantizer | None:
    """Return what converts a model's quantized weights to plain ones; None if there are none.

    Args:
        folder: the model's folder, for the message.
        config: its configuration.

    Raises:
        InputError: the format of the quantized weights is not supported.
    """
    stored = getattr(config.get_text_config(), "quantization_config", None)
    stored = getattr(config, "quantization_config", None) or stored
    if stored is None:
        return None
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(fields.get("quant_method"))
    if method not in _DEQUANTIZED:
        raise InputError(
            f"{folder}: its weights are quantized with {method}",
            f"get the unquantized model, or one in {' or '.join(_DEQUANTIZED)}",
        )
    quantizer: HfQuantizer = AutoHfQuantizer.from_config(
        fields | {"dequantize": True}, pre_quantized=True
    )
    return quantizer
