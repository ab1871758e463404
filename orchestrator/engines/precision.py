"""What a precision means: whether a device has it, the types that hold and compute, and torch's switch for TF32."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from orchestrator.settings.spec import Precision, UserError

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class Types(NamedTuple):
    """What an engine holds, computes and adds in, in words."""

    weights: str  # those that train
    arithmetic: str
    gradients: str  # summed over micro-batches and ranks
    state: str  # of the optimizer


def resolved(asked: Precision, device: torch.device) -> Precision:
    """The precision on that device: `auto` is bf16 where a GPU computes in it, else fp32.

    Raises:
        UserError: the device does not compute in the one that was asked for.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "auto":
        return "bf16" if has_bf16 else "fp32"
    name = device_name(device)
    if asked == "bf16" and device.type == "cuda" and not has_bf16:
        raise UserError("precision", asked, f"{name} does not compute in bf16", "set precision=fp16 or fp32")
    # TF32 came with Ampere, as bf16 did
    if asked == "tf32" and not (has_bf16 and torch.version.hip is None):
        cure = "set precision=fp32, or auto" if device.type == "cpu" else "set precision=fp32 or fp16"
        raise UserError("precision", asked, f"{name} does not compute in TF32", cure)
    return asked


def device_name(device: torch.device) -> str:
    """Return the name of a device for a message."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


def dtype_of(precision: Precision) -> torch.dtype:
    """The type of a precision's arithmetic."""
    return DTYPES.get(precision, torch.float32)


def is_16_bit(precision: Precision) -> bool:
    """Whether it computes in 16 bits."""
    return precision in ("bf16", "fp16")


def dtype_held(precision: Precision) -> torch.dtype:
    """The type of weights that train: an optimizer's small steps would be lost in 16 bits."""
    return torch.float64 if precision == "fp64" else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """The name that the settings have for a type."""
    return next((name for name, named in DTYPES.items() if named == dtype), "fp32")


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """The context in which a forward pass computes in that precision over fp32 weights."""
    return torch.autocast(device.type, dtype_of(precision)) if is_16_bit(precision) else nullcontext()


@contextmanager
def tf32_switched(on: bool) -> Iterator[None]:
    """Products of fp32 matrices in TF32, or not, whatever a library has set before; what was set comes back.

    TF32 has the range of fp32 and 10 bits of its mantissa; sums stay fp32. `on` is for the process, on any thread.
    """
    cuda, cudnn, host = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    backends: list[Any] = [cuda.matmul, cudnn.conv, cudnn.rnn, host.matmul, host.conv, host.rnn]  # pyright: ignore
    before = [backend.fp32_precision for backend in backends]
    old_names = _old_names()
    # torch has two sets of names for this, and refuses an answer by the old ones where only the new ones were used
    _set_old_names("high" if on else "highest", on)
    for backend in backends:
        backend.fp32_precision = "tf32" if on else "ieee"
    try:
        yield
    finally:
        if old_names is not None:
            _set_old_names(*old_names)
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


def _old_names() -> tuple[str, bool] | None:
    """What was set, of products on any device and of cuDNN; None where torch does not say it by these names."""
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def _set_old_names(products: str, cudnn: bool) -> None:
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = cudnn
