"""Log-probs of a sequence do not depend on its neighbours, also where rotary frequencies depend on
the length.
"""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from orchestrator.models.layers import body_of
from orchestrator.models.rope import fixed_up_to, most_positions, use_own_lengths

SHORT, LONG, TRAINED = 12, 30, 16
FACTORS: dict[str, Any] = {
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.5, 3.0, 4.0],
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": TRAINED,
    **FACTORS,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "phi3",
        {
            "rope_parameters": LONGROPE,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": TRAINED,
        },
    ),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": TRAINED}),
    "mscale": (
        "phimoe",
        {
            "rope_parameters": {**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.5},
            "max_position_embeddings": 64,
            "num_local_experts": 4,
        },
    ),
    "by layer type": (
        "gemma3_text",
        {
            "rope_parameters": {
                "sliding_attention": DYNAMIC,
                "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "max_position_embeddings": TRAINED,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 64,
        },
    ),
}


def config_of(kind: str) -> Any:
    model_type, more = KINDS[kind]
    return AutoConfig.for_model(model_type, vocab_size=100, **SIZES, **copy.deepcopy(more))


def model_of(kind: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config_of(kind), dtype=torch.float32).eval()


def batch(*lengths: int) -> dict[str, torch.Tensor]:
    """Rows that begin alike, padded on the right."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": (torch.arange(max(lengths)) * 7 % 99 + 1) * mask, "attention_mask": mask}


@torch.no_grad()
def hidden(model: PreTrainedModel, *lengths: int) -> torch.Tensor:
    return body_of(model)(**batch(*lengths), use_cache=False).last_hidden_state


def alone(kind: str, length: int) -> torch.Tensor:
    """By a model that has seen nothing else: dynamic frequencies stay those of the longest input so
    far.
    """
    return hidden(model_of(kind), length)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_hidden_states_do_not_depend_on_other_rows(kind: str) -> None:
    model = model_of(kind)
    plain = hidden(model, SHORT, LONG)[0, :SHORT]
    # transformers' own depend on the neighbour
    assert not torch.allclose(plain, alone(kind, SHORT), atol=1e-3)
    use_own_lengths(model)
    for lengths in ((SHORT, LONG, 20), (LONG,), (20, 20), (SHORT, SHORT)):
        states = hidden(model, *lengths)
        for row, length in zip(states, lengths, strict=True):
            assert torch.allclose(row[:length], alone(kind, length), atol=1e-5)


def test_a_copy_of_a_model_has_its_own_lengths() -> None:
    model = model_of("longrope")
    use_own_lengths(model)
    other = copy.deepcopy(model)
    hidden(model, LONG)
    assert torch.allclose(
        hidden(other, SHORT, LONG)[0, :SHORT], alone("longrope", SHORT), atol=1e-5
    )


def test_recomputed_layers_have_the_frequencies_of_their_rows() -> None:
    gradients = []
    for recompute in (False, True):
        model = model_of("dynamic").train()
        use_own_lengths(model)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        body_of(model)(**batch(SHORT, LONG), use_cache=False).last_hidden_state[
            0, :SHORT
        ].square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("kind", "fixed", "most"),
    [("longrope", TRAINED, 64), ("dynamic", TRAINED, None), ("by layer type", TRAINED, None)],
)
def test_lengths_come_from_every_kind_of_rope_parameters(
    kind: str, fixed: int, most: int | None
) -> None:
    assert fixed_up_to(config_of(kind)) == fixed
    assert most_positions(config_of(kind)) == most


@pytest.mark.parametrize(
    ("rope", "most"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 32),
        (
            {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            128,
        ),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, 64),
    ],
)
def test_scaled_positions_are_counted_after_scaling(rope: dict[str, Any], most: int) -> None:
    config = AutoConfig.for_model(
        "llama", **SIZES, max_position_embeddings=32, rope_parameters=rope
    )
    assert (fixed_up_to(config), most_positions(config)) == (None, most)
