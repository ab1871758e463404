"""Each loss equals its formula in fp64, in value and gradient, and keeps its head where numbers are extreme."""

import math
from typing import get_args

import pytest
import torch

from orchestrator.dpo.losses import LOSSES, PairTerms, rewards
from orchestrator.settings.spec import DpoSpec, LossType

LOGPS = torch.tensor([-10.0, -20.0, -7.0, -11.0, -18.0, -7.0], dtype=torch.float64)
REFERENCE = torch.tensor([-12.0, -19.0, -7.0, -10.0, -20.0, -7.0], dtype=torch.float64)
TOKENS = torch.tensor([4, 1, 3, 2, 5, 3])


def spec(beta: float = 0.1) -> DpoSpec:
    return DpoSpec(beta=beta)  # pyright: ignore[reportCallIssue]


def test_every_name_of_the_settings_has_a_loss_and_no_other() -> None:
    assert tuple(LOSSES) == get_args(LossType)


def test_the_chosen_half_comes_first() -> None:
    terms = PairTerms.split(LOGPS, REFERENCE, TOKENS)
    assert terms.chosen_logps.tolist() == [-10, -20, -7]
    assert terms.rejected_logps.tolist() == [-11, -18, -7]
    assert terms.ref_chosen_logps.tolist() == [-12, -19, -7]
    assert terms.ref_rejected_logps.tolist() == [-10, -20, -7]
    assert terms.chosen_tokens.tolist() == [4, 1, 3]
    assert terms.rejected_tokens.tolist() == [2, 5, 3]


def test_some_of_the_pairs_keep_their_order() -> None:
    some = PairTerms.split(LOGPS, REFERENCE, TOKENS).of(slice(1, 3))
    assert [term.tolist() for term in some] == [[-20, -7], [-18, -7], [-19, -7], [-20, -7], [1, 3], [5, 3]]


def test_rewards_are_beta_times_the_log_ratio() -> None:
    chosen, rejected = rewards(PairTerms.split(LOGPS, REFERENCE, TOKENS), spec(0.5))
    assert chosen.tolist() == [1.0, -0.5, 0.0]
    assert rejected.tolist() == [-0.5, 1.0, 0.0]


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_sigmoid(beta: float) -> None:
    logps = LOGPS.clone().requires_grad_()
    losses = LOSSES["sigmoid"](PairTerms.split(logps, REFERENCE, TOKENS), spec(beta))
    margins = [beta * 3, -beta * 3, 0.0]
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-m)) for m in margins], rel=1e-14)
    losses.sum().backward()
    slopes = [beta / (1 + math.exp(m)) for m in margins]
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([-s for s in slopes] + slopes, rel=1e-13)


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_ipo_is_of_means_per_completion_token(beta: float) -> None:
    logps = LOGPS.clone().requires_grad_()
    losses = LOSSES["ipo"](PairTerms.split(logps, REFERENCE, TOKENS), spec(beta))
    off = [2 / 4 + 1 / 2 - 0.5 / beta, -1 / 1 - 2 / 5 - 0.5 / beta, -0.5 / beta]  # from the margin that it wants
    assert losses.dtype == torch.float64
    assert losses.tolist() == pytest.approx([each**2 for each in off], rel=1e-14)
    losses.sum().backward()
    slopes = [2 * each / tokens for each, tokens in zip([*off, *(-each for each in off)], TOKENS.tolist(), strict=True)]
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx(slopes, rel=1e-13)


def test_ipo_takes_a_completion_without_tokens_for_one_of_one_as_trl_does() -> None:
    """A user's collator may cut one away; 0 / 0 would make the whole batch NaN."""
    logps = torch.tensor([0.0, -3.0], dtype=torch.float64, requires_grad=True)
    terms = PairTerms.split(logps, torch.tensor([0.0, -2.0], dtype=torch.float64), torch.tensor([0, 2]))
    loss = LOSSES["ipo"](terms, spec(0.5))
    assert loss.tolist() == [(0 + 0.5 - 1) ** 2]
    loss.sum().backward()
    assert logps.grad is not None
    assert logps.grad.isfinite().all()


@pytest.mark.parametrize("name", get_args(LossType))
def test_a_loss_looks_at_one_pair_at_a_time(name: LossType) -> None:
    terms = PairTerms.split(LOGPS, REFERENCE, TOKENS)
    together = LOSSES[name](terms, spec())
    alone = [LOSSES[name](terms.of(slice(i, i + 1)), spec()) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_policy_equal_to_reference_gives_ln_2() -> None:
    losses = LOSSES["sigmoid"](PairTerms.split(LOGPS, LOGPS, TOKENS), spec())
    assert losses.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-15)


@pytest.mark.parametrize(("margin", "expected"), [(1e5, 0.0), (-1e5, 1e5)])
def test_extreme_margins_neither_overflow_nor_lose_their_gradient(margin: float, expected: float) -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    logps = torch.tensor([margin, 0.0], dtype=torch.float64, requires_grad=True)
    loss = LOSSES["sigmoid"](PairTerms.split(logps, zero, TOKENS[:2]), spec(1.0)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert logps.grad is not None
    assert logps.grad.isfinite().all()
    assert logps.grad[0].item() == pytest.approx(0.0 if margin > 0 else -1.0)
