"""Each way to have a frozen judge: what it says, what it shares with the policy, and what is
refused.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.dpo.step import PairStep
from orchestrator.models.attention import use_packed_attention
from orchestrator.models.build_reference import check_reference
from orchestrator.models.head import loss_in_head
from orchestrator.models.identity import identity_of
from orchestrator.models.logps import body_hidden, sequence_logps
from orchestrator.models.reference import Absent, Reference
from orchestrator.settings.errors import UserError
from orchestrator.settings.run import RunSpec
from support.references import DPO, SIZES, built, moved, sharing_words
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
