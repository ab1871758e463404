"""References that a user's function builds."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from orchestrator import create_reference_model
from orchestrator.models.layers import decoder_layers
from orchestrator.models.logps import sequence_logps
from orchestrator.models.quantized import is_quantized
from orchestrator.models.reference import SharedLayers
from orchestrator.settings.errors import UserError
from orchestrator.settings.run import RunSpec
from support.references import built, counters, ours, sharing_words, step_logps
from support.tiny_parts import (
    pair_batch,
    tiny_model,
)


def test_a_users_function_can_build_the_reference(
    spec_of: Callable[..., RunSpec], tmp_path: Path
) -> None:
    batch = pair_batch(4, packed=True)

    def load(policy: PreTrainedModel) -> PreTrainedModel:
        del policy
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )

    policy, reference = built(spec_of(), ref_model=load)
    assert is_quantized(reference.model)
    assert 0 < (reference.logps(batch) - sequence_logps(policy, batch)).abs().max() < 1
    assert not reference.is_start

    policy, reference = built(spec_of(), ref_model=copy.deepcopy)
    assert reference.is_start
    assert torch.equal(reference.logps(batch), sequence_logps(policy, batch))

    def in_16_bits(_: PreTrainedModel) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)

    whole: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():
        for p in whole.parameters():
            p.copy_(p.bfloat16())
    whole.save_pretrained(tmp_path / "base")
    # the same numbers, with which it computes otherwise
    policy, reference = built(spec_of(), ref_model=in_16_bits)
    assert all(
        torch.equal(p, q)
        for p, q in zip(policy.parameters(), reference.model.parameters(), strict=True)
    )
    assert not reference.is_start


def with_pattern(policy: PreTrainedModel) -> PreTrainedModel:
    return create_reference_model(policy, 2, "model.layers.{layer}")


def trls(policy: PreTrainedModel) -> PreTrainedModel:
    from trl.experimental.utils import create_reference_model as of_trl

    return of_trl(policy, num_shared_layers=2)


@pytest.mark.parametrize("function", [ours, with_pattern, trls])
def test_shared_layers_that_a_function_made_are_recognised(
    spec_of: Callable[..., RunSpec], function: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    batch = pair_batch(4, packed=True)
    expected = built(spec_of())[1].logps(batch)
    policy, reference = built(spec_of(), ref_model=function)
    assert isinstance(reference, SharedLayers)
    assert reference.capture_layer == 2
    assert reference.is_start
    policy.to("cpu").to(torch.float64).to(torch.float32)  # by which TRL's sharing is lost
    lower = sharing_words(
        nn.ModuleList([policy.get_input_embeddings(), *decoder_layers(policy)[:2]])
    )
    assert sharing_words(policy) & sharing_words(reference.model) == lower
    passes = counters(policy, reference)
    assert torch.equal(step_logps(policy, reference, batch), expected)
    assert passes["policy 0"] == passes["policy 1"] == passes["reference 2"] == 1
    assert not passes["reference 0"]


def test_a_reference_built_by_a_function_is_checked(spec_of: Callable[..., RunSpec]) -> None:
    def refused(function: Any, **reference: Any) -> str:
        with pytest.raises(UserError) as caught:
            built(spec_of(**reference), ref_model=function)
        return str(caught.value)

    assert "returned a int; return a causal LM" in refused(lambda _: 3)
    assert (
        "returned a model that holds the policy's model.embed_tokens.weight, which trains"
        in refused(lambda p: p)
    )
    assert "vocabulary of 310 tokens, the policy has 300" in refused(
        lambda _: tiny_model(vocab_size=310)
    )


def load_in_8bit(policy: PreTrainedModel) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        policy.config._name_or_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )


@pytest.mark.parametrize(
    ("function", "model", "reference", "line"),
    [
        (
            ours,
            {"disable_dropout": False},
            {},
            "model.disable_dropout = False: the policy's dropout would reach",
        ),
        (
            ours,
            {},
            {"offload": True},
            "reference.offload = True: the model from ref_model shares layers",
        ),
        (
            load_in_8bit,
            {},
            {"offload": True},
            "reference.offload = True: the model from ref_model is in 8 or 4 bits",
        ),
        (
            load_in_8bit,
            {},
            {"sync_every": 2},
            "reference.sync_every = 2: the model from ref_model is in 8 or 4 bits",
        ),
    ],
)
def test_a_functions_reference_has_the_rules_of_its_kind(
    spec_of: Callable[..., RunSpec],
    function: Callable[[PreTrainedModel], PreTrainedModel],
    model: dict[str, Any],
    reference: dict[str, Any],
    line: str,
) -> None:
    with pytest.raises(UserError) as caught:
        built(spec_of(model, **reference), ref_model=function)
    assert str(caught.value).startswith(line)


def test_a_function_can_return_a_base_with_an_adapter(
    spec_of: Callable[..., RunSpec], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    def tuned(policy: PreTrainedModel) -> Any:
        del policy
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        return get_peft_model(
            base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        )

    policy, reference = built(spec_of(), ref_model=tuned)
    batch = pair_batch(4, packed=True)
    actual = step_logps(policy, reference, batch)
    assert not torch.allclose(actual, sequence_logps(policy, batch))
    assert not any(p.requires_grad for p in reference.model.parameters())


def test_create_reference_model_refuses_what_it_cannot_share() -> None:
    with pytest.raises(ValueError, match="num_shared_layers = 2: the model has 2 layers"):
        create_reference_model(tiny_model(), 2)
    with pytest.raises(ValueError, match="does not match any layers"):
        create_reference_model(tiny_model(), 1, "transformer.h.{layer}")
    whole = create_reference_model(tiny_model())
    assert not any(p.requires_grad for p in whole.parameters())
    assert not whole.training
