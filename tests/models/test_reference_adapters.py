"""References of policies with adapters, and bases in 8 and 4 bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from orchestrator.data.collate import Counts
from orchestrator.dpo.step import PairStep
from orchestrator.models.adapters import POLICY, adapter_layers
from orchestrator.models.attention import use_packed_attention
from orchestrator.models.build_reference import build_reference
from orchestrator.models.logps import sequence_logps
from orchestrator.models.policy import build_policy
from orchestrator.models.quantized import is_quantized
from orchestrator.settings.errors import UserError
from orchestrator.settings.loss import DpoSpec
from orchestrator.settings.run import RunSpec
from support.references import DPO, GPT2, LORA, built, moved, step_logps
from support.tiny_parts import (
    both_layouts,
    pair_batch,
    tiny_model,
    tokenizer,
)
from support.tiny_settings import tiny_spec


@pytest.mark.parametrize("kind", ["copy", "shared_layers", "adapter_off", "precomputed"])
def test_every_kind_sums_a_sequence_as_the_policy_does(
    spec_of: Callable[..., RunSpec], kind: str
) -> None:
    dpo, batch = DpoSpec(ld_alpha=0.3), pair_batch(4, packed=True)
    shared = {"num_shared_layers": 2} if kind == "shared_layers" else {}
    spec = spec_of(LORA if kind == "adapter_off" else None, kind=kind, **shared)
    policy, reference = built(spec.model_copy(update={"dpo": dpo}))
    expected = sequence_logps(policy, batch, ld_alpha=0.3)
    output = PairStep(policy, reference, dpo)(batch, Counts(4, 1))
    assert all(
        torch.equal(actual, expected)
        for actual in (output.logps, output.ref_logps, reference.logps(batch))
    )
    assert not torch.equal(sequence_logps(policy, batch), expected)


@both_layouts
def test_the_policy_with_its_adapter_off_equals_its_base(
    spec_of: Callable[..., RunSpec], packed: bool
) -> None:
    batch = pair_batch(4, packed=packed)
    expected = built(spec_of(), packed)[1].logps(batch)
    policy, reference = built(spec_of(LORA, kind="adapter_off"), packed)
    assert torch.equal(sequence_logps(policy, batch), expected)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name and f".{POLICY}." in name for name in trained)
    moved(policy)
    assert torch.equal(step_logps(policy, reference, batch), expected)
    assert not torch.equal(sequence_logps(policy, batch), expected)
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == trained


def test_the_adapter_is_on_again_after_a_failed_reference_pass(
    spec_of: Callable[..., RunSpec],
) -> None:
    policy, reference = built(spec_of(LORA, kind="adapter_off"))
    moved(policy)
    expected = sequence_logps(policy, pair_batch(3, packed=True))
    broken = pair_batch(3, packed=True)._replace(input_ids=torch.tensor([[10**6]]))
    with pytest.raises(IndexError):
        reference.logps(broken)
    assert torch.equal(sequence_logps(policy, pair_batch(3, packed=True)), expected)


@pytest.fixture
def adapter(spec_of: Callable[..., RunSpec], tmp_path: Path) -> dict[str, Any]:
    """Settings of a policy that goes on from an adapter on disk."""
    policy, _ = built(spec_of(LORA))
    moved(policy)
    policy.save_pretrained(tmp_path / "adapter")
    return {"lora": {"adapter_path": str(tmp_path / "adapter")}}


@pytest.mark.parametrize("kind", ["adapter_off", "copy", "precomputed"])
def test_the_reference_of_a_continued_adapter_is_that_adapter(
    spec_of: Callable[..., RunSpec], adapter: dict[str, Any], kind: str
) -> None:
    batch = pair_batch(4, packed=True)
    base = built(spec_of())[1].logps(batch)
    first, _ = built(spec_of(LORA))
    moved(first)
    start = sequence_logps(first, batch)
    policy, reference = built(spec_of(adapter, kind=kind))
    assert torch.equal(sequence_logps(policy, batch), start)
    assert torch.equal(reference.logps(batch), start)
    assert not torch.allclose(start, base)
    if kind != "precomputed":  # which is asked before training alone
        moved(policy)
        assert torch.equal(reference.logps(batch), start)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in first.named_parameters() if ".lora_" in name}


def test_an_adapter_is_quantised_with_the_base_it_is_merged_into(
    spec_of: Callable[..., RunSpec], adapter: dict[str, Any]
) -> None:
    policy, reference = built(spec_of(adapter, kind="int8"))
    assert is_quantized(reference.model)
    assert not adapter_layers(reference.model)
    batch = pair_batch(4, packed=True)
    base = built(spec_of())[1].logps(batch)
    start = sequence_logps(policy, batch)
    assert (reference.logps(batch) - start).abs().max() < 0.3 * (base - start).abs().max()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_was_started_from_the_base_leaves_the_base_alone(
    spec_of: Callable[..., RunSpec], tmp_path: Path, start: Any
) -> None:
    """Such a start takes its factors out of the base: done again when loading, it would take them
    out of it twice.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=start)
    spec_of()
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_A" in name:
                p.mul_(1.1)
    adapted.save_pretrained(tmp_path / "adapter")
    bare = PeftModel.from_pretrained(  # what the factors say beside the base on disk
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        tmp_path / "adapter",
        config=LoraConfig(r=4, target_modules=["q_proj", "up_proj"]),
    ).get_base_model()
    policy, reference = built(
        spec_of({"lora": {"adapter_path": str(tmp_path / "adapter")}}, kind="adapter_off"),
        packed=False,
    )
    batch = pair_batch(4)
    expected = sequence_logps(bare, batch)
    for actual in (sequence_logps(policy, batch), reference.logps(batch)):
        assert torch.allclose(actual, expected, atol=1e-4)


def test_layers_that_are_transposed_are_merged_before_they_are_quantised(tmp_path: Path) -> None:
    from peft import LoraConfig

    init = {"init": {"model_type": "gpt2", "vocab_size": 300, "config": {**GPT2, "n_embd": 64}}}
    first, _ = built(tiny_spec(tmp_path, model=init), packed=False)
    config = LoraConfig(
        r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False
    )
    first.add_adapter(config)
    first.save_pretrained(tmp_path / "adapter")
    goes_on = {**init, "lora": {"adapter_path": str(tmp_path / "adapter")}}
    batch = pair_batch(4)
    for kind in ("int8", "nf4"):
        policy, reference = built(
            tiny_spec(tmp_path, model=goes_on, reference={"kind": kind}), packed=False
        )
        assert (reference.logps(batch) - sequence_logps(policy, batch)).abs().max() < 3


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"target_modules": ["nope"]}, ["model.lora.target_modules", "peft rejects it", "nope"]),
        (
            {"adapter_path": "/no/such/adapter"},
            ["model.lora.adapter_path", "/no/such/adapter", "cannot be loaded"],
        ),
        ({"adapter_path": "{base}"}, ["model.lora.adapter_path", "adapter_config.json"]),
        ({"adapter_path": "{small}"}, ["model.lora.adapter_path", "has shape"]),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    spec_of: Callable[..., RunSpec], tmp_path: Path, lora: dict[str, Any], words: list[str]
) -> None:
    if lora.get("adapter_path") == "{small}":  # of a smaller model
        from peft import LoraConfig

        small = tiny_model()
        small.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
        small.save_pretrained(tmp_path / "small")
    if "adapter_path" in lora:
        path = lora["adapter_path"].format(base=tmp_path / "base", small=tmp_path / "small")
        lora = lora | {"adapter_path": path}
    with pytest.raises(UserError) as caught:
        built(spec_of({"lora": lora}))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("base", ["bf16", "int8", "nf4"])
def test_a_base_in_fewer_bits(spec_of: Callable[..., RunSpec], base: str) -> None:
    batch = pair_batch(4, packed=True)
    policy, reference = built(spec_of({"lora": {"r": 4, "base": base}}, kind="adapter_off"))
    types = {p.dtype for p in policy.parameters() if p.requires_grad}
    assert types == {torch.float32}
    start = sequence_logps(policy, batch)
    assert torch.equal(reference.logps(batch), start)
    output = PairStep(policy, reference, DPO)(batch, Counts(4, 1))
    assert torch.equal(output.logps, output.ref_logps)  # training or not, on any device
    output.loss.backward()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)
    policy.eval()
    assert torch.equal(sequence_logps(policy, batch), start)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("int8", BitsAndBytesConfig(load_in_8bit=True)),
        ("nf4", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    ],
)
def test_it_is_quantised_as_transformers_does_it(
    spec_of: Callable[..., RunSpec], tmp_path: Path, kind: str, config: Any
) -> None:
    policy, reference = built(spec_of(kind=kind))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    use_packed_attention(theirs, "cpu")
    batch = pair_batch(4, packed=True)
    for module in theirs.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    assert (reference.logps(batch) - sequence_logps(theirs, batch)).abs().max() < 1e-3
    held = {name: value.data_ptr() for name, value in reference.model.named_parameters()}
    first = reference.logps(batch)
    assert torch.equal(reference.logps(batch), first)
    assert {
        name: value.data_ptr() for name, value in reference.model.named_parameters()
    } == held  # quantised once
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert all(p.requires_grad for p in policy.parameters())
    assert reference.model.get_output_embeddings().weight.dtype == torch.float32
    assert reference.own_bytes(policy) < 0.6 * sum(p.nbytes for p in policy.parameters())


def test_a_model_whose_linear_layers_are_transposed_is_quantised(tmp_path: Path) -> None:
    init = {"init": {"model_type": "gpt2", "vocab_size": 300, "config": {**GPT2, "n_embd": 64}}}
    for kind in ("int8", "nf4"):
        policy, reference = built(tiny_spec(tmp_path, model=init, reference={"kind": kind}))
        batch = pair_batch(4, packed=True)
        assert type(policy).__name__ == "GPT2LMHeadModel"
        error = (reference.logps(batch) - sequence_logps(policy, batch)).abs().max()
        assert 0 < error < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
@pytest.mark.parametrize(
    ("model", "reference", "most"),
    [
        ({}, {}, 1e-3),
        ({}, {"offload": True}, 1e-3),
        ({}, {"kind": "shared_layers", "num_shared_layers": 2}, 1e-3),
        ({"lora": {"r": 4}}, {"kind": "adapter_off"}, 1e-3),
        ({"lora": {"r": 4, "base": "nf4"}}, {"kind": "adapter_off"}, 1e-2),
        ({}, {"kind": "int8"}, 1.0),  # its kernels for a CPU round elsewhere
        ({}, {"kind": "nf4"}, 1e-2),
    ],
)
def test_reference_log_probs_on_a_gpu_equal_those_on_a_cpu(
    spec_of: Callable[..., RunSpec], model: dict[str, Any], reference: dict[str, Any], most: float
) -> None:
    spec, gpu = spec_of(model, **reference), torch.device("cuda")
    expected = step_logps(*built(spec), pair_batch(4, packed=True))
    policy = build_policy(spec, tokenizer(), torch.float32).to(gpu)
    judge = build_reference(spec, policy, torch.float32)
    for each in {policy, judge.model}:
        use_packed_attention(each, "sdpa")
    actual = step_logps(policy, judge, pair_batch(4, packed=True).to(gpu))
    assert (actual.cpu() - expected).abs().max() < most
