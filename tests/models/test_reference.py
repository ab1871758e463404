"""The reference is a frozen model of its own: no parameter of the step, nothing shared with the policy."""

from pathlib import Path

import pytest
import torch
from tiny import ALONE, both_layouts, on_ranks, pair_batch, tiny_model

from orchestrator.models.logps import body_hidden, loss_in_head
from orchestrator.models.reference import Reference, build_reference, check_reference, reference_identity
from orchestrator.settings.spec import ModelSpec, ReferenceSpec, UserError

MODEL = ModelSpec(path="policy")  # pyright: ignore[reportCallIssue]


def reference_spec(path: str | None = None) -> ReferenceSpec:
    return ReferenceSpec(path=path)  # pyright: ignore[reportCallIssue]


def test_a_copy_is_frozen_and_shares_nothing() -> None:
    policy = tiny_model()
    reference = build_reference(reference_spec(), MODEL, policy)
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


@both_layouts
def test_its_log_probs_are_to_the_last_bit_those_of_the_same_policy_without_gradient(packed: bool) -> None:
    policy, batch = tiny_model(packed=packed), pair_batch(4, packed=packed)
    found = build_reference(reference_spec(), MODEL, policy)(batch)
    hidden = body_hidden(policy, batch)
    expected = loss_in_head(policy, hidden, batch, lambda _, logps: logps[:, 0] - logps[:, 1], with_metrics=True)
    assert expected.loss.requires_grad
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert torch.equal(found, expected.logps)


def test_another_model_can_judge(tmp_path: Path) -> None:
    tiny_model(seed=5).save_pretrained(tmp_path)
    policy = tiny_model(dtype=torch.float64)
    reference = build_reference(reference_spec(path=str(tmp_path)), MODEL, policy)
    expected = Reference(tiny_model(seed=5).double())
    assert {p.dtype for p in reference.model.parameters()} == {torch.float64}
    assert torch.allclose(reference(pair_batch(3)), expected(pair_batch(3)), rtol=1e-6)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    tiny_model(vocab_size=310).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="vocabulary of 310 tokens, the policy of 300"):
        check_reference(reference_spec(path=str(tmp_path)), tiny_model().config)
    check_reference(reference_spec(path=str(tmp_path)), tiny_model(vocab_size=310).config)
    check_reference(reference_spec(), tiny_model().config)


def test_a_model_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"reference.path = '/no/such/model': is not a folder"):
        build_reference(reference_spec(path="/no/such/model"), MODEL, tiny_model())


def test_its_identity_is_its_weights_and_config_whatever_the_ranks() -> None:
    one, same, other = tiny_model(), tiny_model(packed=True), tiny_model()
    with torch.no_grad():
        next(other.parameters())[3, 5] += 1e-6
    scaled = tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    one.config._name_or_path = "elsewhere"
    expected = reference_identity(one, ALONE)
    assert reference_identity(same, ALONE) == expected
    assert reference_identity(other, ALONE) != expected
    assert reference_identity(scaled, ALONE) != expected
    assert reference_identity(scaled, ALONE)["weights"] == expected["weights"]
    for ranks in (2, 3):
        assert on_ranks(ranks, lambda world: reference_identity(one, world)) == [expected] * ranks
