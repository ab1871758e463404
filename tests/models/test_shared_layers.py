"""References that share layers with the policy compute, train and store them once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.data.collate import Counts
from orchestrator.dpo.step import PairStep
from orchestrator.models.layers import decoder_layers
from orchestrator.models.logps import sequence_logps
from orchestrator.models.reference import SharedLayers
from orchestrator.settings.errors import UserError
from orchestrator.settings.run import RunSpec
from support.references import DPO, GPT2, LAYERS, built, counters, moved, step_logps
from support.tiny_parts import (
    both_layouts,
    pair_batch,
)
from support.tiny_settings import TINY_MODEL, tiny_spec


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
    # the policy's own top layer is computed again in the backward pass, no other is
    top = 1 + checkpointing
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

    # and the embeddings
    expected = sum(1 for layer in decoder_layers(policy)[:3] for _ in layer.parameters()) + 1
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
    # and the last norm
    assert own == sum(p.nbytes for p in decoder_layers(reference.model)[3].parameters()) + 64 * 4


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
    # what the head was: stored once
    assert reference.model.get_output_embeddings().weight is embeddings.weight


def test_whatever_lies_below_the_shared_layers_is_frozen_with_them(tmp_path: Path) -> None:
    config = {
        "hidden_size": 64,
        "n_layer": 3,
        "n_head": 4,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    # a norm follows its embeddings
    init = {"init": {"model_type": "bloom", "vocab_size": 300, "config": config}}
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
