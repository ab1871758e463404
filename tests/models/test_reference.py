"""The reference is a frozen model of its own: no parameter of the step, nothing shared with the policy."""

from pathlib import Path

import pytest
import torch
from tiny import pair_batch, tiny_model

from orchestrator.models.logps import body_hidden, sequence_sums, token_terms
from orchestrator.models.reference import Reference, build_reference, check_reference
from orchestrator.settings.spec import ModelSpec, ReferenceSpec, UserError

MODEL = ModelSpec(path="policy")


def test_a_copy_is_frozen_and_shares_nothing() -> None:
    policy = tiny_model()
    reference = build_reference(ReferenceSpec(), MODEL, policy)
    assert not isinstance(reference, torch.nn.Module)
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert not reference.model.training
    assert policy.training
    assert all(p.requires_grad for p in policy.parameters())
    own, other = ({p.data_ptr() for p in model.parameters()} for model in (reference.model, policy))
    assert own.isdisjoint(other)
    with torch.no_grad():
        next(policy.parameters()).add_(1)
    assert not torch.equal(next(policy.parameters()), next(reference.model.parameters()))


def test_its_log_probs_are_those_of_the_same_policy_without_gradient() -> None:
    policy, batch = tiny_model(), pair_batch(4)
    found = Reference(tiny_model())(batch)
    expected = sequence_sums(token_terms(policy, body_hidden(policy, batch), batch).logps, batch)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert torch.equal(found, expected.detach())


def test_another_model_can_judge(tmp_path: Path) -> None:
    tiny_model(seed=5).save_pretrained(tmp_path)
    policy = tiny_model(dtype=torch.float64)
    reference = build_reference(ReferenceSpec(path=str(tmp_path)), MODEL, policy)
    expected = Reference(tiny_model(seed=5).double())
    assert {p.dtype for p in reference.model.parameters()} == {torch.float64}
    assert torch.allclose(reference(pair_batch(3)), expected(pair_batch(3)), rtol=1e-6)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    tiny_model(vocab_size=310).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="vocabulary of 310 tokens, the policy of 300"):
        check_reference(ReferenceSpec(path=str(tmp_path)), tiny_model().config)
    check_reference(ReferenceSpec(path=str(tmp_path)), tiny_model(vocab_size=310).config)
    check_reference(ReferenceSpec(), tiny_model().config)


def test_a_model_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"reference.path = '/no/such/model': is not a folder"):
        build_reference(ReferenceSpec(path="/no/such/model"), MODEL, tiny_model())
