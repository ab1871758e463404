"""Our norms, attentions and MLPs compute what transformers' compute, value and gradient, with their
own weights.
"""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from orchestrator.models.fused import ATTENTIONS, MLPS, NORMS, fuse

KINDS = ["llama", "qwen2", "qwen3", "mistral", "gemma"]


def model(kind: str, dtype: torch.dtype, **config: Any) -> PreTrainedModel:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    actual = AutoConfig.for_model(
        kind, vocab_size=60, head_dim=16, num_key_value_heads=1, **sizes, **config
    )
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(actual, dtype=dtype)
    with torch.no_grad():
        for parameter in built.parameters():  # norms' weights too
            parameter += 0.1 * torch.randn_like(parameter)
    return built


def loss_and_gradients(built: PreTrainedModel) -> list[torch.Tensor]:
    ids = torch.arange(12).view(2, 6)
    loss = built(input_ids=ids, labels=ids).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(built.parameters()))]


@pytest.mark.parametrize("kind", KINDS)
def test_fused_layers_equal_those_of_transformers(kind: str) -> None:
    plain = model(kind, torch.float32)
    fused = copy.deepcopy(plain)
    fuse(fused)
    names = {type(m).__name__ for m in fused.modules() if "forward" in vars(m)}
    assert names == {n for n in (*NORMS, *ATTENTIONS, *MLPS) if n.lower().startswith(kind)}
    for mine, theirs in zip(loss_and_gradients(fused), loss_and_gradients(plain), strict=True):
        assert (mine - theirs).norm() <= 2e-6 * theirs.norm() + 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_fused_layers_keep_fp64(kind: str) -> None:
    built = model(kind, torch.float64)
    fuse(built)
    for module in (m for m in built.modules() if type(m).__name__ in NORMS):
        assert isinstance(module.weight, torch.Tensor)
        x = torch.randn(3, 7, len(module.weight), dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(module, (x,), atol=1e-8)
        weight = module.weight + 1 if kind == "gemma" else module.weight
        exact = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        assert (module(x) - exact).abs().max() < 1e-13


def test_a_copy_reads_its_own_weights() -> None:
    """The reference is a copy of the policy: it must not follow the policy's norms."""
    policy = model("qwen2", torch.float32)
    fuse(policy)
    reference = copy.deepcopy(policy)
    before = loss_and_gradients(reference)[0]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    assert torch.equal(loss_and_gradients(reference)[0], before)
    assert not torch.equal(loss_and_gradients(policy)[0], before)


def test_another_activation_and_16_bit_weights_are_left_alone() -> None:
    gelu, half = model("llama", torch.float32, hidden_act="gelu"), model("llama", torch.bfloat16)
    fuse(gelu)
    fuse(half)
    assert {type(m).__name__ for m in gelu.modules() if "forward" in vars(m)} == {
        "LlamaRMSNorm",
        "LlamaAttention",
    }
    assert not any("forward" in vars(m) for m in half.modules())


def test_frozen_norms_get_no_gradient() -> None:
    built = model("qwen2", torch.float64)
    fuse(built)
    norm: Any = built.base_model.norm
    norm.weight.requires_grad_(False)
    x = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    norm(x).sum().backward()
    assert norm.weight.grad is None
    assert x.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_no_further_from_fp64_than_transformers_own(kind: str) -> None:
    plain = model(kind, torch.float32)
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    fuse(fused)
    _, *options = loss_and_gradients(exact)
    errors: list[float] = []
    for built in (fused, plain):
        with torch.autocast("cpu", torch.bfloat16):
            _, *actual = loss_and_gradients(built)
        squares = [
            (mine - theirs).square().sum() for mine, theirs in zip(actual, options, strict=True)
        ]
        errors.append(torch.stack(squares).sum().sqrt().item())
    assert errors[0] < 1.3 * errors[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_norms_compute_in_fp32_as_transformers_do(dtype: torch.dtype) -> None:
    """Real models have channels of some hundred: squared in fp16 they are infinite."""
    plain = model("qwen2", torch.float32)
    fused = copy.deepcopy(plain)
    fuse(fused)
    x = torch.randn(2, 5, 32)
    x[..., 3] = 400.0
    with torch.autocast("cpu", dtype):
        mine, theirs = (built.base_model.norm(x) for built in (fused, plain))
    assert (mine - theirs).abs().max() < 1e-5
