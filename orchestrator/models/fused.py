"""RMSNorm, rotary embedding and SwiGLU with explicit derivatives: fewer kernels, memory passes and
saved tensors.

transformers' modules leave all three to autograd, operation by operation. Its RMSNorm computes in
fp32 for every input dtype, which with fp64 weights would leave an error of 1e-8 in the loss.

Legend: R rows, T tokens, H hidden size, h heads, D their size, I intermediate size.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear, rms_norm, silu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm", "GemmaRMSNorm")
ATTENTIONS = (
    "LlamaAttention",
    "Qwen2Attention",
    "Qwen3Attention",
    "MistralAttention",
    "GemmaAttention",
)
MLPS = ("LlamaMLP", "Qwen2MLP", "Qwen3MLP", "MistralMLP")


def fuse(model: "PreTrainedModel", dtype: torch.dtype | None = None) -> None:
    """Replace the forward of the norms, attentions and MLPs listed above; weights, names and hooks
    stay the same.

    A model with 16-bit weights keeps its own forward, whose order of rounding other programs
    reproduce; one that was cast to 16 bits gets its own back. dtype: the dtype in which the weights
    will train, if they are not in it yet.
    """
    from transformers.activations import ACT2FN

    precise = (dtype or model.dtype) in (torch.float32, torch.float64)
    for module in model.modules():
        kind = type(module).__name__
        if not precise:
            if getattr(module.__dict__.get("forward"), "func", None) in (_norm, _attend, _mlp):
                del module.forward
        elif kind in NORMS:
            module.forward = partial(_norm, module, kind == "GemmaRMSNorm")
        elif kind in ATTENTIONS:
            module.forward = partial(_attend, module)
        elif kind in MLPS and isinstance(module.act_fn, nn.SiLU | type(ACT2FN["silu"])):
            module.forward = partial(_mlp, module)


def _norm(norm: Any, is_gemma: bool, hidden: torch.Tensor) -> torch.Tensor:
    # Gemma scales by 1 + weight
    weight, epsilon = (
        (1 + norm.weight, norm.eps) if is_gemma else (norm.weight, norm.variance_epsilon)
    )
    if hidden.is_cuda:  # there torch has a kernel for it, and another for its derivative
        return rms_norm(hidden.to(weight.dtype), weight.shape, weight, epsilon)
    return _RmsNorm.apply(hidden, weight, epsilon)  # pyright: ignore[reportReturnType]


def _attend(
    attention: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kernel = ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation)
    if kernel is None or past_key_values is not None:  # the model's own attention, or generation
        inputs = hidden_states, position_embeddings, attention_mask, past_key_values
        return type(attention).forward(attention, *inputs, **options)
    rows = hidden_states.shape[:-1]
    projected = _products(hidden_states, attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (x.view(*rows, -1, attention.head_dim) for x in projected)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = (x.unsqueeze(-2) for x in position_embeddings)
    half = sin[..., : attention.head_dim // 2]
    query, key = _Rotation.apply(query, key, cos, half)  # pyright: ignore
    output, weights = kernel(
        attention,
        *(x.transpose(1, 2) for x in (query, key, value)),
        attention_mask,
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        sliding_window=getattr(
            attention, "sliding_window", getattr(attention.config, "sliding_window", None)
        ),
        **options,
    )
    return attention.o_proj(output.reshape(*rows, -1)), weights


def _products(hidden: torch.Tensor, *layers: nn.Module) -> tuple[torch.Tensor, ...]:
    """Return the outputs of several linear layers for one input. Under autocast, compute them in
    one product: autocast would cast weight, bias and input of each layer, and their gradients back.
    """
    if not torch.is_autocast_enabled(hidden.device.type) or not all(map(_is_bare, layers)):
        return tuple(layer(hidden) for layer in layers)
    weights, biases = zip(*((layer.weight, layer.bias) for layer in layers), strict=True)
    bias = None if biases[0] is None else torch.cat(biases)
    return linear(hidden, torch.cat(weights), bias).split([len(weight) for weight in weights], -1)


def _is_bare(layer: nn.Module) -> bool:
    """Return whether the layer is a plain nn.Linear: no adapter, no quantisation, no hooks."""
    watched = (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )
    return type(layer) is nn.Linear and not watched and "forward" not in vars(layer)


def _mlp(mlp: Any, hidden: torch.Tensor) -> torch.Tensor:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and _is_bare(mlp.gate_proj) and _is_bare(mlp.up_proj):
        hidden = hidden.to(torch.get_autocast_dtype(kind))  # once for both layers
    return mlp.down_proj(_SwiGlu.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden)))


class _RmsNorm(torch.autograd.Function):
    """RMSNorm, x r w with r = (mean of x^2 + epsilon)^-1/2 over the last dimension. Zhang &
    Sennrich 2019, arXiv 1910.07467.

    With n = x r and g the gradient: dw = sum of g n, dx = r (g w - n * mean of g w n).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        x = x.to(weight.dtype)
        # it would square in 16 bits, where 400^2 overflows fp16
        with torch.autocast(x.device.type, enabled=False):
            scale = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(epsilon).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        d_weight = (
            (gradients[0] * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        )
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        d_normed = gradients[0] * weight
        with torch.autocast(x.device.type, enabled=False):
            mean = torch.linalg.vecdot(d_normed, normed).div_(x.shape[-1]).unsqueeze(-1)
        return d_normed.addcmul_(normed, mean, value=-1).mul_(scale), d_weight, None


class _Rotation(torch.autograd.Function):
    """Rotary embedding of the halves x1, x2 of a head: x1 cos - x2 sin, x2 cos + x1 sin. Su et al.
    2021, arXiv 2104.09864.

    query, key: [R, T, h, D]; cos: [R or 1, T, 1, D]; sin: [R or 1, T, 1, D/2], as both halves have
    the same angles. Under autocast the output has the autocast dtype, in which attention runs.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.dtypes = query.dtype, key.dtype
        kind = query.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return tuple(_turn(x, cos, sin, dtype or x.dtype, 1) for x in (query, key))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        turned_back = (
            _turn(x, cos, sin, dtype, -1) for x, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*turned_back, None, None)


def _turn(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype, sign: int
) -> torch.Tensor:
    """Rotate x; sign -1 rotates back."""
    x1, x2 = x.chunk(2, -1)
    product = x * cos
    first, second = product.chunk(2, -1)
    if product.dtype == dtype:
        first.addcmul_(x2, sin, value=-sign)
        second.addcmul_(x1, sin, value=sign)
        return product
    turned = torch.empty_like(product, dtype=dtype)  # rounded once, when stored
    for half, (own, other, by) in zip(
        turned.chunk(2, -1), ((first, x2, -sign), (second, x1, sign)), strict=True
    ):
        torch.addcmul(own, other, sin, value=by, out=half)
    return turned


class _SwiGlu(torch.autograd.Function):
    """SwiGLU: silu(gate) * up. Shazeer 2020, arXiv 2002.05202. gate, up: [..., T, I]. The backward
    pass recomputes silu(gate) instead of saving it.
    """

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, ...]:
        gate, up = ctx.saved_tensors
        d_up = silu(gate).mul_(gradients[0])
        return torch.ops.aten.silu_backward(gradients[0] * up, gate), d_up
