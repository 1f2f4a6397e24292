"""Names of the numeric precisions, and the bytes of one number. Imports no torch."""

from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]
PrecisionChoice = Literal["auto", "fp32", "bf16", "fp16"]
"""A precision, or `auto` for the one that suits the device."""

BYTES_PER_ELEMENT: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
