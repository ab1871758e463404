"""Precisions: which a device supports, the dtypes that store and compute, and torch's switch for
TF32.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from orchestrator.models.dtypes import DTYPES
from orchestrator.settings.errors import UserError
from orchestrator.settings.precision import PRECISION_TRAITS, Precision


class Types(NamedTuple):
    """The dtypes of an engine, as text."""

    weights: str  # of the trainable weights
    arithmetic: str
    gradients: str  # as summed over micro-batches and ranks
    state: str  # of the optimizer


def resolved(precision: Precision, device: torch.device) -> Precision:
    """Return the precision on that device: `auto` is bf16 if it is a GPU that supports it, else
    fp32.

    Raises:
        UserError: the device does not support the precision.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    name = device_name(device)
    if precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise UserError(
            "precision", precision, f"{name} does not support bf16", "set precision=fp16 or fp32"
        )
    # TF32 came with Ampere, as did bf16
    if precision == "tf32" and not (has_bf16 and torch.version.hip is None):
        cure = (
            "set precision=fp32, or auto" if device.type == "cpu" else "set precision=fp32 or fp16"
        )
        raise UserError("precision", precision, f"{name} does not support TF32", cure)
    return precision


def device_name(device: torch.device) -> str:
    """Return the name of a device for a message."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


def dtype_of(precision: Precision) -> torch.dtype:
    """Return the dtype of a precision's arithmetic."""
    return DTYPES.get(precision, torch.float32)  # tf32 is stored as fp32


def is_16_bit(precision: Precision) -> bool:
    """Return whether the precision computes in 16 bits."""
    return PRECISION_TRAITS[precision].is_16_bit


def dtype_held(precision: Precision) -> torch.dtype:
    """Return the dtype of the trainable weights."""
    return torch.float64 if PRECISION_TRAITS[precision].weights == "fp64" else torch.float32


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return the context in which a forward pass computes in that precision with fp32 weights."""
    return (
        torch.autocast(device.type, dtype_of(precision)) if is_16_bit(precision) else nullcontext()
    )


@contextmanager
def tf32_switched(on: bool) -> Iterator[None]:
    """Switch TF32 for products of fp32 matrices on or off, and restore the previous switches
    afterwards.

    TF32 has the range of fp32 and 10 bits of its mantissa; sums stay fp32. The switch applies to
    the whole process, on every thread.
    """
    libraries: Any = torch.backends
    cuda, cudnn, host = libraries.cuda, libraries.cudnn, libraries.mkldnn
    backends = [cuda.matmul, cudnn.conv, cudnn.rnn, host.matmul, host.conv, host.rnn]
    before = [backend.fp32_precision for backend in backends]
    old_names = _old_names()
    # torch has two sets of names for this, and raises for the old ones if only the new ones were
    # set
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
    """Return torch's old switches, for matrix products and for cuDNN; None if torch cannot report
    them by these names.
    """
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def _set_old_names(products: str, cudnn: bool) -> None:
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = cudnn
