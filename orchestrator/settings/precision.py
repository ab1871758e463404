"""Name the precisions, and state the facts about each that decide how a run computes."""

from dataclasses import dataclass
from typing import Literal

Precision = Literal["auto", "bf16", "fp16", "tf32", "fp32", "fp64"]


@dataclass(frozen=True)
class PrecisionTraits:
    """Facts about a precision."""

    weights: Literal["fp32", "fp64"] = "fp32"
    """Type of the trainable weights and of softmax: small updates would be lost in 16 bits."""
    is_16_bit: bool = False
    """Computes in 16 bits, with weights cast to that type or under autocast."""
    scales_loss: bool = False
    """Has a small range: the loss is scaled, and a step whose gradient overflows is skipped."""
    uses_tf32: bool = False
    """Multiplies fp32 matrices in TF32."""


PRECISION_TRAITS: dict[Precision, PrecisionTraits] = {
    "auto": PrecisionTraits(),  # what holds for each precision that it may become on a device
    "bf16": PrecisionTraits(is_16_bit=True),
    "fp16": PrecisionTraits(is_16_bit=True, scales_loss=True),
    "tf32": PrecisionTraits(uses_tf32=True),
    "fp32": PrecisionTraits(),
    "fp64": PrecisionTraits(weights="fp64"),
}
