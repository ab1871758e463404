"""Each way to have a frozen judge: what it says, what it shares with the policy, and what is
refused.
"""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from orchestrator import create_reference_model
from orchestrator.data.collate import Counts, PairBatch
from orchestrator.dpo.step import PairStep
from orchestrator.models.adapters import POLICY, adapter_layers
from orchestrator.models.attention import use_packed_attention
from orchestrator.models.build_reference import build_reference, check_reference
from orchestrator.models.head import loss_in_head
from orchestrator.models.identity import identity_of
from orchestrator.models.layers import decoder_layers
from orchestrator.models.logps import body_hidden, sequence_logps
from orchestrator.models.policy import build_policy
from orchestrator.models.quantized import is_quantized
from orchestrator.models.reference import Absent, Reference, SharedLayers
from orchestrator.settings.errors import UserError
from orchestrator.settings.loss import DpoSpec
from orchestrator.settings.run import RunSpec
from support.thread_ranks import on_ranks
from support.tiny_parts import (
    ALONE,
    both_layouts,
    collator,
    ids,
    pair_batch,
    pair_rows,
    tiny_model,
    tokenizer,
)
from support.tiny_settings import TINY_MODEL, tiny_spec

LAYERS = 4
SIZES = {"num_hidden_layers": LAYERS, "hidden_size": 64}
DPO = DpoSpec(beta=0.3)


@pytest.fixture
def spec_of(tmp_path: Path) -> Callable[..., RunSpec]:
    """Settings whose model is `tiny_model(**SIZES)` on disk."""
    tiny_model(**SIZES).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")

    def spec_of(model: dict[str, Any] | None = None, **reference: Any) -> RunSpec:
        return tiny_spec(
            tmp_path,
            model={"init": None, "path": str(tmp_path / "base"), **(model or {})},
            reference=reference,
        )

    return spec_of


def built(
    spec: RunSpec, packed: bool = True, ref_model: Any = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, Any]:
    """Policy and reference, for one layout."""
    policy = build_policy(spec, tokenizer(), dtype)
    reference = build_reference(spec, policy, dtype, ref_model)
    for model in {policy, reference.model} if packed else ():
        use_packed_attention(model, "cpu")
    return policy, reference


def step_logps(policy: PreTrainedModel, reference: Reference, batch: PairBatch) -> torch.Tensor:
    """Return the reference's log-probs within a step, after the policy's body."""
    return PairStep(policy, reference, DPO)(batch, Counts(4, 1)).ref_logps


def moved(policy: PreTrainedModel) -> None:
    """Change everything that trains."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=draw, dtype=p.dtype)


def sharing_words(model: nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


# --- a copy ---------------------------------------------------------------------------------------


def test_a_copy_is_frozen_and_shares_nothing(spec_of: Callable[..., RunSpec]) -> None:
    policy, reference = built(spec_of())
    assert not isinstance(reference, torch.nn.Module)
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert not reference.model.training
    assert policy.training
    assert all(p.requires_grad for p in policy.parameters())
    assert sharing_words(policy).isdisjoint(sharing_words(reference.model))
    before = {name: value.clone() for name, value in reference.tensors().items()}
    moved(policy)
    assert all(torch.equal(value, before[name]) for name, value in reference.tensors().items())


@both_layouts
def test_reference_log_probs_are_bitwise_those_of_the_policy_without_gradient(
    spec_of: Callable[..., RunSpec], packed: bool
) -> None:
    policy, reference = built(spec_of(), packed)
    batch = pair_batch(4, packed=packed)
    actual = reference.logps(batch)
    hidden = body_hidden(policy, batch)
    expected = loss_in_head(
        policy,
        hidden,
        batch,
        lambda _, sums: sums.logps[:, 0] - sums.logps[:, 1],
        with_metrics=True,
    )
    assert expected.loss.requires_grad
    assert actual.dtype == torch.float64
    assert not actual.requires_grad
    assert torch.equal(actual, expected.logps)


def test_another_model_can_be_the_reference(
    spec_of: Callable[..., RunSpec], tmp_path: Path
) -> None:
    tiny_model(seed=5, **SIZES).save_pretrained(tmp_path / "other")
    _, reference = built(spec_of(path=str(tmp_path / "other")), packed=False, dtype=torch.float64)
    expected = Reference(tiny_model(seed=5, **SIZES).double())
    assert {p.dtype for p in reference.model.parameters()} == {torch.float64}
    assert torch.allclose(reference.logps(pair_batch(3)), expected.logps(pair_batch(3)), rtol=1e-6)
    assert not reference.is_start


@pytest.mark.parametrize("path", [False, True], ids=["start", "path"])
def test_a_copy_can_have_a_type_of_its_own(
    spec_of: Callable[..., RunSpec], tmp_path: Path, path: bool
) -> None:
    other = {"path": str(tmp_path / "base")} if path else {}
    policy, reference = built(spec_of(dtype="bf16", **other))
    assert {p.dtype for p in reference.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    batch = pair_batch(4, packed=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    use_packed_attention(theirs, "cpu")  # with the norms and MLPs of transformers
    assert torch.equal(reference.logps(batch), sequence_logps(theirs, batch))
    assert 0 < (reference.logps(batch) - sequence_logps(policy, batch)).abs().max() < 1
    assert (reference.exact is not None) == path


@both_layouts
def test_an_offloaded_copy_has_equal_log_probs_and_keeps_nothing_on_the_device(
    spec_of: Callable[..., RunSpec], packed: bool
) -> None:
    batch = pair_batch(4, packed=packed)
    _, there = built(spec_of(), packed)
    policy, reference = built(spec_of(offload=True), packed)
    assert {p.device.type for p in reference.model.parameters()} == {"meta"}
    assert torch.equal(reference.logps(batch), there.logps(batch))
    assert {p.device.type for p in reference.model.parameters()} == {"meta"}
    assert {p.device.type for p in policy.parameters()} == {"cpu"}
    whole = [identity_of(one.tensors(), one.model.config, ALONE) for one in (reference, there)]
    assert whole[0] == whole[1]


# --- shared layers --------------------------------------------------------------------------------


def counters(policy: PreTrainedModel, reference: Reference) -> Counter[str]:
    """Forward passes of each layer, of policy and reference, from now on; a shared one is the
    policy's.
    """
    passes: Counter[str] = Counter()

    def count(name: str, module: nn.Module) -> None:
        # forward itself, not a hook: gradient checkpointing runs a layer again without its hooks
        inner = module.input_layernorm.forward
        module.input_layernorm.forward = lambda *args: passes.update([name]) or inner(*args)

    policys = {id(m): f"policy {i}" for i, m in enumerate(decoder_layers(policy))}
    for number, layer in enumerate(decoder_layers(policy)):
        count(f"policy {number}", layer)
    for number, layer in enumerate(decoder_layers(reference.model)):
        if id(layer) not in policys:
            count(f"reference {number}", layer)
    return passes


@pytest.mark.parametrize("checkpointing", [False, True])
@both_layouts
def test_a_shared_layer_runs_once_per_micro_batch(
    spec_of: Callable[..., RunSpec], packed: bool, checkpointing: bool
) -> None:
    spec = spec_of(kind="shared_layers", num_shared_layers=3)
    spec = spec.model_copy(
        update={
            "training": spec.training.model_copy(update={"gradient_checkpointing": checkpointing})
        }
    )
    policy, reference = built(spec, packed)
    batch, passes = pair_batch(4, packed=packed), counters(policy, reference)
    PairStep(policy, reference, DPO)(batch, Counts(4, 1)).loss.backward()
    top = (
        1 + checkpointing
    )  # the policy's own top layer is computed again in the backward pass, no other is
    assert passes == {
        "policy 0": 1,
        "policy 1": 1,
        "policy 2": 1,
        "policy 3": top,
        "reference 3": 1,
    }
    assert all((p.grad is not None) == p.requires_grad for p in policy.parameters())


@both_layouts
def test_shared_layers_have_the_log_probs_of_a_copy(
    spec_of: Callable[..., RunSpec], packed: bool
) -> None:
    batch = pair_batch(4, packed=packed)
    for k in range(1, LAYERS):
        policy, reference = built(spec_of(kind="shared_layers", num_shared_layers=k), packed)
        expected = built(spec_of(), packed)[1].logps(batch)
        assert torch.equal(step_logps(policy, reference, batch), expected)
        moved(policy)
        assert torch.equal(step_logps(policy, reference, batch), expected)
        assert torch.equal(reference.logps(batch), expected)  # on its own, as for the cache
        assert not torch.equal(sequence_logps(policy, batch), expected)


def test_shared_layers_are_stored_once_whatever_is_done_to_the_models(
    spec_of: Callable[..., RunSpec],
) -> None:
    policy, reference = built(spec_of(kind="shared_layers", num_shared_layers=3))

    def shared() -> int:
        ours = {p.data_ptr() for p in policy.parameters()}
        return sum(p.data_ptr() in ours for p in reference.model.parameters())

    expected = (
        sum(1 for layer in decoder_layers(policy)[:3] for _ in layer.parameters()) + 1
    )  # and the embeddings
    assert shared() == expected
    for change in (
        lambda m: m.to(torch.float64),
        lambda m: m.to("cpu"),
        lambda m: m.float(),
        lambda m: m.train(),
    ):
        change(policy)
        assert shared() == expected
    frozen = {id(p) for p in policy.parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad])
    assert not frozen & {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = reference.own_bytes(policy)
    assert (
        own == sum(p.nbytes for p in decoder_layers(reference.model)[3].parameters()) + 64 * 4
    )  # and the last norm


@pytest.mark.parametrize("tied_head", ["untie", "freeze"])
def test_a_head_that_is_one_with_frozen_embeddings(
    spec_of: Callable[..., RunSpec], tied_head: str
) -> None:
    spec = spec_of(model={"tied_head": tied_head}, kind="shared_layers", num_shared_layers=1)
    policy, reference = built(spec)
    head: Any = policy.get_output_embeddings()
    embeddings: Any = policy.get_input_embeddings()
    is_untied = tied_head == "untie"
    assert (head.weight is not embeddings.weight) == is_untied
    assert head.weight.requires_grad == is_untied
    assert not embeddings.weight.requires_grad
    assert policy.config.tie_word_embeddings != is_untied
    assert (
        reference.model.get_output_embeddings().weight is embeddings.weight
    )  # what the head was: stored once


def test_whatever_lies_below_the_shared_layers_is_frozen_with_them(tmp_path: Path) -> None:
    config = {
        "hidden_size": 64,
        "n_layer": 3,
        "n_head": 4,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    init = {
        "init": {"model_type": "bloom", "vocab_size": 300, "config": config}
    }  # a norm follows its embeddings
    batch = pair_batch(3)
    shared = {"kind": "shared_layers", "num_shared_layers": 2}
    policy, reference = built(tiny_spec(tmp_path, model=init, reference=shared), packed=False)
    expected = step_logps(policy, reference, batch)
    moved(policy)
    assert torch.equal(step_logps(policy, reference, batch), expected)
    assert not any(
        p.requires_grad
        for name, p in policy.named_parameters()
        if "word_embeddings_layernorm" in name
    )


def test_the_twin_of_shared_layers_trains_the_same(spec_of: Callable[..., RunSpec]) -> None:
    policy, _ = built(spec_of(kind="shared_layers", num_shared_layers=2))
    twin, reference = built(spec_of(model={"num_frozen_layers": 2}))
    named = [{n: p.requires_grad for n, p in model.named_parameters()} for model in (policy, twin)]
    assert named[0] == named[1]
    assert not isinstance(reference, SharedLayers)


def test_upper_layers_that_cannot_be_run_alone_are_refused(
    spec_of: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "orchestrator.models.layers._Passed.forward", lambda _, hidden_states, *__, **___: (0,)
    )
    monkeypatch.setattr(  # a model that enters its layers by another way
        "orchestrator.models.layers.UpperLayers.__call__", lambda self, captured, **_: captured
    )
    with pytest.raises(
        UserError, match=r"reference.kind = 'shared_layers': the upper layers of a Qwen2ForCausalLM"
    ):
        built(spec_of(kind="shared_layers", num_shared_layers=2))


GPT2 = {
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
LLAMA = {k: v for k, v in TINY_MODEL.items() if k != "num_hidden_layers"} | {"num_hidden_layers": 3}


@both_layouts
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("gpt2", GPT2),
        ("llama", LLAMA),
        ("gemma", {**LLAMA, "head_dim": 16}),
        ("qwen3", {**LLAMA, "head_dim": 16}),
    ],
)
def test_shared_layers_in_other_architectures(
    tmp_path: Path, kind: str, config: dict[str, Any], packed: bool
) -> None:
    init = {
        "init": {"model_type": kind, "vocab_size": 300, "config": {**config, "vocab_size": 300}}
    }
    reference = {"kind": "shared_layers", "num_shared_layers": 2}
    batch = pair_batch(3, packed=packed)
    policy, shared = built(tiny_spec(tmp_path, model=init, reference=reference), packed)
    moved(policy)
    expected = built(tiny_spec(tmp_path, model=init), packed)[1].logps(batch)
    assert torch.equal(step_logps(policy, shared, batch), expected)


# --- adapters -------------------------------------------------------------------------------------

LORA = {"lora": {"r": 4}}


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


# --- 8 and 4 bits ---------------------------------------------------------------------------------


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


# --- a Python user's own function -----------------------------------------------------------------


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
    policy, reference = built(
        spec_of(), ref_model=in_16_bits
    )  # the same numbers, with which it computes otherwise
    assert all(
        torch.equal(p, q)
        for p, q in zip(policy.parameters(), reference.model.parameters(), strict=True)
    )
    assert not reference.is_start


def ours(policy: PreTrainedModel) -> PreTrainedModel:
    return create_reference_model(policy, num_shared_layers=2)


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


# --- a reference that moves -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "sharing", [{}, {"kind": "shared_layers", "num_shared_layers": 2}], ids=["copy", "shared"]
)
def test_sync_updates_only_weights_the_reference_owns(
    spec_of: Callable[..., RunSpec], sharing: dict[str, Any]
) -> None:
    policy, reference = built(spec_of(sync_every=1, sync_alpha=0.25, **sharing))
    before = {name: value.clone() for name, value in reference.model.state_dict().items()}
    moved(policy)
    reference.sync(dict(policy.named_parameters(remove_duplicate=False)), 0.25)
    ours = policy.state_dict()
    for name, value in reference.model.state_dict().items():
        assert torch.allclose(value, 0.75 * before[name] + 0.25 * ours[name], atol=1e-7), name
    assert reference.model.lm_head.weight.data_ptr() != policy.lm_head.weight.data_ptr()
    kept = PairStep(policy, reference, DPO).saved()
    own = {name for name in kept if name.startswith("reference.")}
    if sharing:
        assert all(
            "layers.0" not in name and "layers.1" not in name and "embed" not in name
            for name in own
        )
        assert "reference.lm_head.weight" in own
    else:
        assert own == {f"reference.{name}" for name, _ in reference.model.named_parameters()}


def test_a_reference_of_another_shape_cannot_move(
    spec_of: Callable[..., RunSpec], tmp_path: Path
) -> None:
    tiny_model(**{**SIZES, "intermediate_size": 96}).save_pretrained(tmp_path / "wide")
    with pytest.raises(
        UserError, match=r"reference.sync_every.*has shape \(96, 64\), the policy \(64, 64\)"
    ):
        built(spec_of(sync_every=2, path=str(tmp_path / "wide")))


# --- refused at the start -------------------------------------------------------------------------


def test_a_reference_with_another_vocabulary_is_refused(
    spec_of: Callable[..., RunSpec], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny_model(vocab_size=310).save_pretrained(other)
    with pytest.raises(UserError, match="vocabulary of 310 tokens, the policy of 300"):
        check_reference(spec_of(path=str(other)), tiny_model().config, tokenizer())
    check_reference(spec_of(path=str(other)), tiny_model(vocab_size=310).config, tokenizer())
    check_reference(spec_of(), tiny_model().config, tokenizer())


def test_a_reference_with_another_tokenizer_is_refused_naming_a_token(
    spec_of: Callable[..., RunSpec], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny_model().save_pretrained(other)
    spec = spec_of(path=str(other))
    check_reference(spec, tiny_model().config, tokenizer())  # weights alone
    tokenizer().save_pretrained(other)
    check_reference(spec, tiny_model().config, tokenizer())
    content = (other / "tokenizer.json").read_text()
    [first, second] = (f'"{letter}": {ids(letter)[0]}' for letter in "xy")
    assert first in content
    swapped = content.replace(first, f'"x": {ids("y")[0]}').replace(second, f'"y": {ids("x")[0]}')
    (other / "tokenizer.json").write_text(swapped)
    with pytest.raises(UserError) as caught:
        check_reference(spec, tiny_model().config, tokenizer())
    assert (
        f"its tokenizer maps 'x' to id {ids('y')[0]}, the policy's to {ids('x')[0]} (2 tokens"
        in str(caught.value)
    )


def test_a_model_that_is_not_there_is_refused(spec_of: Callable[..., RunSpec]) -> None:
    with pytest.raises(UserError, match=r"reference.path = '/no/such/model': is not a folder"):
        built(spec_of(path="/no/such/model"))


def test_an_absent_reference_names_the_rows_without_log_probs() -> None:
    rows = [{**row, "pair_id": number} for row, number in zip(pair_rows(2), (17, 4), strict=True)]
    with pytest.raises(
        UserError, match=r"the log-probs of pairs \[17, 4\] are not all in the cache"
    ):
        Absent().logps(collator(packed=True)(rows))


# --- identity -------------------------------------------------------------------------------------


def test_the_identity_covers_weights_and_config_on_any_number_of_ranks() -> None:
    def identity(model: PreTrainedModel, world: Any = ALONE) -> dict[str, Any]:
        return identity_of(Reference(model).tensors(), model.config, world)

    one, same, other = tiny_model(), tiny_model(packed=True), tiny_model()
    with torch.no_grad():
        next(other.parameters())[3, 5] += 1e-6
    scaled = tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    one.config._name_or_path = "elsewhere"
    expected = identity(one)
    assert identity(same) == expected
    assert identity(other) != expected
    assert identity(scaled) != expected
    assert identity(scaled)["weights"] == expected["weights"]
    for ranks in (2, 3):
        assert on_ranks(ranks, lambda world: identity(one, world)) == [expected] * ranks


@pytest.mark.parametrize("model", [{}, {"tied_head": "freeze"}], ids=["untied", "tied"])
def test_references_with_equal_weights_have_equal_identities(
    spec_of: Callable[..., RunSpec], model: dict[str, Any]
) -> None:
    def weights(spec: RunSpec) -> str:
        _, reference = built(spec)
        return identity_of(reference.tensors(), reference.model.config, ALONE)["weights"]

    expected = weights(spec_of())
    assert weights(spec_of(kind="precomputed")) == expected
    assert weights(spec_of(LORA)) == expected
    assert weights(spec_of(LORA, kind="adapter_off")) == expected
    assert weights(spec_of(LORA, kind="precomputed")) == expected
    assert weights(spec_of(model, kind="shared_layers", num_shared_layers=2)) == expected
    assert weights(spec_of(kind="int8")) != expected
    assert weights(spec_of(dtype="bf16")) != expected
