"""RMSNorm and SwiGLU with their derivatives written down: fewer passes over memory, fewer saved tensors, true fp64.

transformers' modules leave both to autograd, operation by operation, and its RMSNorm computes in fp32 whatever its
input, which in fp64 would leave 1e-8 in the loss. Legend: T tokens, H hidden size, I intermediate size.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import silu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm", "GemmaRMSNorm")
MLPS = ("LlamaMLP", "Qwen2MLP", "Qwen3MLP", "MistralMLP")


def fuse(model: "PreTrainedModel", dtype: torch.dtype | None = None) -> None:
    """Replace the forward of the norms and MLPs known here; weights, names and hooks stay as they are.

    A model with weights of 16 bits keeps its own, whose order of rounding other programs reproduce; one that was cast
    to them is given its own again. dtype: of the weights it will train with, where it is not theirs yet.
    """
    from transformers.activations import ACT2FN

    precise = (dtype or model.dtype) in (torch.float32, torch.float64)
    for module in model.modules():
        kind = type(module).__name__
        if not precise:
            if getattr(module.__dict__.get("forward"), "func", None) in (_norm, _mlp):
                del module.forward
        elif kind in NORMS:
            module.forward = partial(_norm, module, kind == "GemmaRMSNorm")
        elif kind in MLPS and isinstance(module.act_fn, nn.SiLU | type(ACT2FN["silu"])):
            module.forward = partial(_mlp, module)


def _norm(norm: Any, is_gemma: bool, hidden: torch.Tensor) -> torch.Tensor:
    if is_gemma:  # its weight is what is added to 1
        return _RmsNorm.apply(hidden, 1 + norm.weight, norm.eps)  # pyright: ignore[reportReturnType]
    return _RmsNorm.apply(hidden, norm.weight, norm.variance_epsilon)  # pyright: ignore[reportReturnType]


def _mlp(mlp: Any, hidden: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(_SwiGlu.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden)))


class _RmsNorm(torch.autograd.Function):
    """x r w with r = (mean of x^2 + epsilon)^-1/2 over the last dimension. Zhang & Sennrich 2019, arXiv 1910.07467.

    With n = x r and g the gradient: dw = sum of g n, dx = r (g w - n * mean of g w n).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        x = x.to(weight.dtype)
        with torch.autocast(x.device.type, enabled=False):  # it would square in 16 bits, and 400 overflows fp16
            scale = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(epsilon).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        d_weight = (gradients[0] * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        d_normed = gradients[0] * weight
        with torch.autocast(x.device.type, enabled=False):
            mean = torch.linalg.vecdot(d_normed, normed).div_(x.shape[-1]).unsqueeze(-1)
        return d_normed.addcmul_(normed, mean, value=-1).mul_(scale), d_weight, None


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up. Shazeer 2020, arXiv 2002.05202. gate, up: [..., T, I]. silu(gate) is made again, not saved."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, ...]:
        gate, up = ctx.saved_tensors
        d_up = silu(gate).mul_(gradients[0])
        return torch.ops.aten.silu_backward(gradients[0] * up, gate), d_up
