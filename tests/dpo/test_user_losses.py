"""Losses of a user stand beside the built-in ones, and wrong ones are refused."""

import re
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from orchestrator.data.collate import Counts
from orchestrator.dpo.losses import PairTerms, pair_losses
from orchestrator.dpo.user_losses import check_losses
from orchestrator.settings.errors import UserError
from orchestrator.settings.loss import (
    DpoSpec,
)
from support.loss_terms import EPSILON, LOGPS, REFERENCE, TOKENS, of, spec


def users(monkeypatch: pytest.MonkeyPatch, loss: Any) -> DpoSpec:
    """Settings that name a function of a user's beside another loss."""
    module = ModuleType("a_users_losses")
    module.mine = loss
    monkeypatch.setitem(sys.modules, "a_users_losses", module)
    return spec(loss_type=["a_users_losses:mine", "sigmoid"], loss_weights=[2, 0.5])


def test_a_users_loss_stands_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    dpo = users(monkeypatch, lambda terms, dpo: dpo.label_smoothing * terms.chosen_logps**2)
    check_losses(dpo, with_margins=False)
    actual = pair_losses(PairTerms.split(LOGPS, REFERENCE, TOKENS), dpo, Counts(3, 9))
    expected = [
        2 * EPSILON * logp**2 + 0.5 * loss
        for logp, loss in zip([10, 20, 7], of("sigmoid"), strict=True)
    ]
    assert actual.tolist() == pytest.approx(expected, rel=1e-14)


def test_a_users_loss_is_given_what_weighting_needs_where_that_is_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dpo = users(monkeypatch, lambda terms, _: -terms.on_policy * terms.chosen_logps)
    check_losses(dpo.model_copy(update={"use_weighting": True}), with_margins=False)
    with pytest.raises(UserError, match="raises TypeError"):
        check_losses(dpo, with_margins=False)


def test_a_users_loss_is_given_margins_where_the_data_have_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dpo = users(monkeypatch, lambda terms, _: terms.margins - terms.chosen_logps)
    check_losses(dpo, with_margins=True)
    with pytest.raises(UserError, match="raises TypeError"):
        check_losses(dpo, with_margins=False)


@pytest.mark.parametrize(
    ("loss", "complaint"),
    [
        (lambda terms, _: (-terms.chosen_logps).mean(), r"returns \(\) for 3 synthetic pairs"),
        (lambda terms, _: terms.chosen_logps * 1j, "returns torch.complex128 for"),
        (lambda _, __: 1.0, "returns float for 3 synthetic pairs"),
        (lambda terms, _: terms.chosen_logps.log(), "nan.*not finite"),
        (lambda terms, _: terms.chosen_logps.detach(), "without a gradient"),
        (
            lambda terms, _: terms.chosen_logps - terms.chosen_logps.mean(),
            "but .* for one at a time",
        ),
        (lambda terms: terms.chosen_logps, "raises TypeError"),
        (lambda terms, _: (terms.chosen_logps * 0).sqrt(), "has the gradient .*(nan|inf)"),
    ],
)
def test_a_users_loss_of_a_wrong_shape_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch, loss: Any, complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        check_losses(users(monkeypatch, loss), with_margins=False)
    assert str(caught.value).startswith("dpo.loss_type = 'a_users_losses:mine': ")
    assert "\n" not in str(caught.value)


def test_an_exception_of_a_users_loss_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(terms: PairTerms, _: DpoSpec) -> torch.Tensor:
        raise ValueError("not\nthese")

    line = (
        r"dpo.loss_type = 'a_users_losses:mine': raised ValueError: not these "
        r"\(test_user_losses.py line \d+; for 3 pairs\)"
    )
    with pytest.raises(UserError) as caught:
        pair_losses(
            PairTerms.split(LOGPS, REFERENCE, TOKENS), users(monkeypatch, loss), Counts(3, 9)
        )
    assert re.match(line, str(caught.value))
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_users_loss_that_is_not_there_is_refused() -> None:
    for name, complaint in (
        ("nowhere_at_all:loss", "cannot be imported"),
        ("math:loss", "module math has no loss"),
    ):
        with pytest.raises(UserError, match=complaint):
            check_losses(spec(loss_type=name), with_margins=False)
