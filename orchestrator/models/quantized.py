"""Quantise linear layers to 8 or 4 bits in memory by bitsandbytes, and convert them back."""

import copy
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from orchestrator.settings.model import Quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUTLIER = (
    6.0  # an activation larger than this keeps 16 bits: Dettmers et al. 2022, arXiv 2208.07339
)


def quantized(model: "PreTrainedModel", kind: Quantized, device: torch.device) -> "PreTrainedModel":
    """Return a frozen copy of the model on a device with quantised linear layers, except the head,
    as in transformers' load_in_8bit and load_in_4bit (nf4). The rest keeps its dtype.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    # deepcopy does not copy modules in its memo: no full copy ever exists
    copies: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            copies[id(module)] = _linear(module, kind, device)
    other: Any = copy.deepcopy(model, copies)
    other = other.requires_grad_(False).to(device)
    # peft looks for it
    setattr(other, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
    return other


def exact_int8_products() -> None:
    """Make bitsandbytes multiply int8 matrices exactly on every CPU, under autocast too.

    No-op without bitsandbytes.

    On a CPU for which it has no kernel (without AVX-512), it calls torch.matmul in fp32, which
    autocast casts to 16 bits: sums overflow fp16 (65,504, and one product is up to 16,129), and
    bf16 keeps 8 bits of them.
    """
    op = "bitsandbytes::int8_linear_matmul"
    if "bitsandbytes" in sys.modules and not torch._C._dispatch_has_kernel_for_dispatch_key(
        op, "CPU"
    ):
        torch.library.register_kernel(op, "cpu", _int8_product)


def _int8_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left @ right.T in int32, exact for up to 1,040 columns and to fp32 rounding beyond."""
    with torch.autocast("cpu", enabled=False):
        return (left.float() @ right.float().T).to(torch.int32)


def is_quantized(model: nn.Module) -> bool:
    """Return whether a model, quantised here or by transformers, has layers in 8 or 4 bits."""
    return is_int8(model) or bool(getattr(model, "is_loaded_in_4bit", False))


def is_int8(model: nn.Module) -> bool:
    """Return whether a model has layers in 8 bits, which round their input as well."""
    return bool(getattr(model, "is_loaded_in_8bit", False))


@torch.no_grad()
def unquantized(layer: Any) -> Any:
    """Return an 8- or 4-bit layer as an fp32 nn.Linear or Conv1D; any other module as it is."""
    weight = getattr(layer, "weight", None)
    if (state := getattr(weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        full = dequantize_4bit(layer.weight.data, state).float()
    elif isinstance(layer, nn.Linear) and layer.weight.dtype == torch.int8:
        from bitsandbytes.functional import int8_vectorwise_dequant

        held: Any = layer  # the first forward pass moves its scales from the weight to the state
        full = int8_vectorwise_dequant(
            held.weight.data, held.state.SCB if held.weight.SCB is None else held.weight.SCB
        )
    else:
        return layer
    if getattr(layer, "was_conv1d", False):
        return _conv1d(full, layer.bias)
    plain = nn.Linear(full.shape[1], full.shape[0], bias=layer.bias is not None, device=full.device)
    plain.weight = nn.Parameter(full, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
    return plain


def _conv1d(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """Return GPT-2's kind of linear layer, which is stored [in, out], from a weight [out, in]."""
    from transformers.pytorch_utils import Conv1D

    plain = Conv1D(*weight.shape).to(weight.device)
    plain.weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
    return plain


def _linear(linear: Any, kind: Quantized, device: torch.device) -> nn.Module:
    """Quantise one layer and move it to a device."""
    from bitsandbytes import nn as bnb_

    bnb: Any = bnb_  # bitsandbytes does not export its types
    weight: torch.Tensor = linear.weight.detach()
    # GPT-2's Conv1D is [in, out]
    weight = weight if isinstance(linear, nn.Linear) else weight.t().contiguous()
    options: Any = {"bias": linear.bias is not None, "device": "meta"}
    layer: Any
    if kind == "int8":
        layer = bnb.Linear8bitLt(
            weight.shape[1], weight.shape[0], has_fp16_weights=False, **options
        )
        layer.state.threshold, layer.state.use_pool = OUTLIER, True
        layer.weight = bnb.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        layer.register_forward_pre_hook(_own_input)
    else:
        layer = bnb.LinearNF4(
            weight.shape[1], weight.shape[0], compress_statistics=False, **options
        )
        layer.weight = bnb.Params4bit(
            weight.cpu(),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=False,
            module=layer,
        )
        # it repacks the weight at the first evaluation; then training fails
        layer.support_avx512bf16_for_cpu = False
    bias = linear.bias
    if bias is not None:
        bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    layer.bias = bias
    layer = layer.to(device)
    layer.was_conv1d = not isinstance(linear, nn.Linear)
    layer.register_forward_pre_hook(_as_matrix)
    layer.register_forward_hook(_as_before)
    # on a CPU an int8 layer computes differently in training mode, but policy and reference must
    # agree in both modes
    layer.training = False
    layer.train = _stays
    return layer


def _own_input(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Copy an fp16 input on a CPU: bitsandbytes temporarily zeroes outliers in place, which
    autograd treats as a change.
    """
    there, *rest = inputs
    return (
        there.clone() if there.dtype == torch.float16 and there.device.type == "cpu" else there,
        *rest,
    )


def _as_matrix(layer: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Flatten the rows of an input of four dimensions or more, which bitsandbytes does not support
    on a CPU.
    """
    x, *rest = inputs
    layer.rows_before = x.shape[:-1] if x.ndim > 3 else None
    return (x if layer.rows_before is None else x.flatten(0, -2), *rest)


def _as_before(layer: Any, _: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output if layer.rows_before is None else output.view(*layer.rows_before, -1)


def _stays(mode: bool = True) -> None:
    del mode
