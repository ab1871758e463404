"""Small forward passes detect a model's behaviour: noise, causality, padding, weights without a
gradient.
"""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from orchestrator.models.behaviour import (
    check_causal,
    depends_on_gradients,
    freeze_unreached,
    silence,
    still_noise,
)
from orchestrator.models.layers import freeze_lowest
from orchestrator.models.layout_check import padding_error
from orchestrator.models.quantized import quantized
from orchestrator.settings.errors import UserError
from support.tiny_parts import tiny_model

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 100,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
VISION = {**SIZES, "image_size": 32, "patch_size": 16}
TEXT = {**SIZES, "head_dim": 8}


def model_of(model_type: str, **config: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **config), dtype=torch.float32
        ).train()


def multimodal() -> PreTrainedModel:
    return model_of("gemma3", text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)


def twice(model: PreTrainedModel) -> bool:
    """Return whether two forward passes in training mode agree to the last bit."""
    ids = torch.arange(40)[None] % 90
    torch.manual_seed(1)
    first = model(input_ids=ids).logits
    torch.manual_seed(2)
    return torch.equal(first, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        (
            "opt",
            {
                "hidden_size": 32,
                "ffn_dim": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "vocab_size": 100,
            },
        ),
        (
            "bart",
            {
                "d_model": 32,
                "decoder_layers": 2,
                "decoder_ffn_dim": 48,
                "vocab_size": 100,
                "decoder_layerdrop": 0.5,
            },
        ),
        ("gemma3", {"text_config": {**TEXT, "attention_dropout": 0.5}, "vision_config": VISION}),
    ],
)
def test_every_rate_of_noise_in_a_config_is_set_to_zero(
    model_type: str, config: dict[str, Any]
) -> None:
    assert not twice(model_of(model_type, **config))
    quiet = AutoConfig.for_model(model_type, **config)
    silence(quiet)
    model = AutoModelForCausalLM.from_config(quiet).train()
    assert still_noise(model) == []
    assert twice(model)


@pytest.mark.parametrize(("model_type", "noise"), [("phimoe", 0.01), ("mixtral", 0.5)])
def test_a_router_that_draws_random_numbers_stays_in_evaluation_mode(
    model_type: str, noise: float
) -> None:
    model = model_of(model_type, **SIZES, num_local_experts=4, router_jitter_noise=noise)
    assert not twice(model)
    state = torch.get_rng_state()
    routers = still_noise(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(routers) == 2
    assert model.eval().train().training
    assert twice(model)
    model(input_ids=torch.arange(40)[None]).logits.sum().backward()
    assert all(
        p.grad is not None for name in routers for p in model.get_submodule(name).parameters()
    )


class Noisy(nn.Linear):
    """Noise in any mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.randn(1)


def test_noise_that_evaluation_mode_keeps_is_refused_by_its_module() -> None:
    model: Any = tiny_model()
    model.model.layers[1].mlp.down_proj = Noisy(64, 32)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj draws random numbers"):
        still_noise(model)


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def test_a_model_that_looks_ahead_is_refused() -> None:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    encoder = model_of("roberta", **sizes, vocab_size=100).eval()
    with pytest.raises(UserError, match="depend on later tokens"):
        check_causal(encoder, lambda ids: logits_of(encoder, ids))
    decoder = model_of("roberta", **sizes, vocab_size=100, is_decoder=True).eval()
    check_causal(decoder, lambda ids: logits_of(decoder, ids))


def test_logits_that_depend_on_gradients_are_noticed() -> None:
    model: Any = tiny_model()
    assert not depends_on_gradients(model)
    assert model.training
    model.model.norm.register_forward_hook(
        lambda _, __, output: output + 1e-6 * torch.is_grad_enabled()
    )
    assert depends_on_gradients(model)


def test_padding_that_reaches_the_hidden_states_is_measured() -> None:
    model: Any = tiny_model()
    assert padding_error(model, CPU) < 1e-5
    model.model.norm.register_forward_hook(
        lambda _, __, output: output + output.mean(1, keepdim=True)
    )
    assert padding_error(model, CPU) > 1e-2


def test_weights_that_text_never_reaches_are_frozen_and_no_others() -> None:
    model = multimodal()
    names = freeze_unreached(model, ranks=1)
    assert {name.split(".")[1] for name in names} == {"vision_tower", "multi_modal_projector"}
    model(input_ids=torch.arange(20)[None]).logits.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == set(names)
    assert all(p.grad is None for p in tiny_model().parameters())
    assert freeze_unreached(tiny_model(), ranks=1) == []


class Routed(nn.Module):
    """Experts in a list, of which a probe may reach only some."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[0](x)


def test_an_expert_that_other_tokens_may_reach_is_not_frozen() -> None:
    model: Any = tiny_model()
    model.model.layers[0].mlp = Routed()
    assert freeze_unreached(model, ranks=1) == []
    with pytest.raises(UserError, match="an expert has no gradient on a rank"):
        freeze_unreached(model, ranks=2)
    assert freeze_unreached(tiny_model(), ranks=2) == []


def test_layers_that_the_settings_freeze_are_not_taken_for_experts() -> None:
    model = tiny_model()
    freeze_lowest(model, 1, keep_head=False)
    assert freeze_unreached(model, ranks=2) == []


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_layer_takes_inputs_of_four_dimensions(kind: Any) -> None:
    layer = quantized(tiny_model(), kind, CPU).get_submodule("model.layers.0.mlp.gate_proj")
    x = torch.randn(2, 3, 5, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), layer(x.flatten(0, 2)).view(2, 3, 5, -1))
    assert layer(x[0]).shape == (3, 5, 64)
