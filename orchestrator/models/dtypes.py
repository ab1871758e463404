"""Name the floating-point dtypes, in the settings and in safetensors files."""

import torch

DTYPES: dict[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""By their names in the settings."""

SAFETENSORS_DTYPES = {name.upper().replace("FP", "F"): dtype for name, dtype in DTYPES.items()}
"""By their names in the headers of safetensors files: F64, F32, BF16, F16."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in the settings; torch's name of one that they do not have."""
    return next(
        (name for name, each in DTYPES.items() if each == dtype), str(dtype).removeprefix("torch.")
    )
