"""Each loss equals its formula in fp64, in value and gradient, and keeps its head where numbers are
extreme.
"""

import math
from itertools import product
from typing import get_args

import pytest
import torch

from orchestrator.data.collate import Counts
from orchestrator.dpo.losses import BATCH_LOSSES, LOSSES, PairTerms, pair_losses, rewards
from orchestrator.settings.loss import (
    LOSS_TRAITS,
    OF_BATCH,
    OF_SCORES,
    SMOOTHED,
    WITH_MARGIN,
    DpoSpec,
    FDivergence,
    LossType,
)
from support.loss_terms import EPSILON, LOGPS, REFERENCE, TOKENS, of, spec

NAMES = pytest.mark.parametrize("name", LOSSES)


def slopes(
    name: LossType, terms: PairTerms, dpo: DpoSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B] losses and their derivatives by the log-probs of chosen and rejected."""
    chosen, rejected = (each.clone().requires_grad_() for each in terms[:2])
    terms = terms._replace(chosen_logps=chosen, rejected_logps=rejected, chosen_token_sum=chosen)
    losses = LOSSES[name](terms, dpo)
    gradients = torch.autograd.grad(losses.sum(), (chosen, rejected), allow_unused=True)
    by_chosen, by_rejected = (
        torch.zeros_like(losses) if each is None else each for each in gradients
    )
    return losses.detach(), by_chosen, by_rejected


def test_every_name_of_the_settings_has_a_loss_and_no_other() -> None:
    assert tuple(name for name in get_args(LossType) if name not in BATCH_LOSSES) == tuple(LOSSES)
    assert tuple(BATCH_LOSSES) == OF_BATCH
    assert {*SMOOTHED, *OF_SCORES, *WITH_MARGIN} <= {*LOSSES, *BATCH_LOSSES}


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
    expected = [[-20, -7], [-18, -7], [-19, -7], [-20, -7], [1, 3], [5, 3], [-20, -7]]
    assert [None if term is None else term.tolist() for term in some] == [*expected, None, None]


def test_rewards_are_beta_times_the_log_ratio() -> None:
    chosen, rejected = rewards(PairTerms.split(LOGPS, REFERENCE, TOKENS), spec(0.5))
    assert chosen.tolist() == [1.0, -0.5, 0.0]
    assert rejected.tolist() == [-0.5, 1.0, 0.0]


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_sigmoid_is_the_logistic_loss_of_the_margin(beta: float) -> None:
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
    # from the margin that it wants
    off = [2 / 4 + 1 / 2 - 0.5 / beta, -1 / 1 - 2 / 5 - 0.5 / beta, -0.5 / beta]
    assert losses.dtype == torch.float64
    assert losses.tolist() == pytest.approx([each**2 for each in off], rel=1e-14)
    losses.sum().backward()
    slopes = [
        2 * each / tokens
        for each, tokens in zip([*off, *(-each for each in off)], TOKENS.tolist(), strict=True)
    ]
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx(slopes, rel=1e-13)


def test_ipo_takes_a_completion_without_tokens_for_one_of_one_as_trl_does() -> None:
    """A user's collator may cut one away; 0 / 0 would make the whole batch NaN."""
    logps = torch.tensor([0.0, -3.0], dtype=torch.float64, requires_grad=True)
    terms = PairTerms.split(
        logps, torch.tensor([0.0, -2.0], dtype=torch.float64), torch.tensor([0, 2])
    )
    loss = LOSSES["ipo"](terms, spec(0.5))
    assert loss.tolist() == [(0 + 0.5 - 1) ** 2]
    loss.sum().backward()
    assert logps.grad is not None
    assert logps.grad.isfinite().all()


@NAMES
def test_a_loss_looks_at_one_pair_at_a_time(name: LossType) -> None:
    terms = PairTerms.split(LOGPS, REFERENCE, TOKENS)
    together = LOSSES[name](terms, spec())
    alone = [LOSSES[name](terms.of(slice(i, i + 1)), spec()) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


LN2, B, TAU, GAMMA, Q = math.log(2), 0.3, 0.05, 0.5, -2.5
TILT = math.log((1 - EPSILON) / EPSILON)
ODDS = 1 / (1 - math.exp(Q))  # slope of the log odds
DISCOPOP = 0.25 * (1 - LN2) / TAU - 0.75
# The loss of a pair whose policy is the reference, of 4 and 2 tokens and Q nats a token, and its
# two slopes.
AT_THE_START: dict[LossType, tuple[float, float, float]] = {
    "sigmoid": (LN2, -B / 2, B / 2),
    "hinge": (1, -B, B),
    "ipo": (1 / (4 * B**2), -1 / (4 * B), 1 / (2 * B)),
    "exo_pair": (-LN2 - math.log(EPSILON * (1 - EPSILON)) / 2, -B * TILT / 4, B * TILT / 4),
    "nca_pair": (2 * LN2, -B / 4, B / 4),
    "robust": (LN2, -B / 2 / (1 - 2 * EPSILON), B / 2 / (1 - 2 * EPSILON)),
    "bco_pair": (2 * LN2, -B / 2, B / 2),
    "sppo_hard": (1 / (2 * B**2), -1 / B, 1 / B),
    "apo_zero": (1, -B / 4, B / 4),
    "apo_down": (1, 0, B / 4),
    "discopop": (LN2 / 2 + 0.5, B * DISCOPOP, -B * DISCOPOP),
    "sft": (10, -1, 0),
    "sigmoid_norm": (LN2, -B / 2 / 4, B / 2 / 2),
    "cdpo": (LN2, -B / 2 * (1 - 2 * EPSILON), B / 2 * (1 - 2 * EPSILON)),
    "simpo": (
        (1 - EPSILON) * math.log1p(math.exp(GAMMA)) + EPSILON * math.log1p(math.exp(-GAMMA)),
        -B / 4 * (1 / (1 + math.exp(-GAMMA)) - EPSILON),
        B / 2 * (1 / (1 + math.exp(-GAMMA)) - EPSILON),
    ),
    "orpo": (-Q + B * LN2, -1 / 4 - B / 2 * ODDS / 4, B / 2 * ODDS / 2),
}


@NAMES
def test_policy_equal_to_reference(name: LossType) -> None:
    logps, tokens = torch.tensor([4 * Q, 2 * Q], dtype=torch.float64), torch.tensor([4, 2])
    slope = slopes(name, PairTerms.split(logps, logps, tokens), spec(B))
    assert [each.item() for each in slope] == pytest.approx(
        AT_THE_START[name], rel=1e-13, abs=1e-15
    )


@NAMES
def test_a_loss_with_its_pairs_turned_round_is_another(name: LossType) -> None:
    """The chosen one is to gain: by 3 nats over the rejected one it is better than with 3 nats
    less.
    """
    terms = PairTerms.split(
        torch.tensor([-9.0, -12.0, -12.0, -9.0]).double(),
        torch.full((4,), -9.0).double(),
        TOKENS[:4],
    )
    terms = terms._replace(chosen_tokens=torch.full((2,), 6), rejected_tokens=torch.full((2,), 6))
    better, worse = LOSSES[name](terms, spec(0.2)).tolist()
    assert better < worse


@NAMES
def test_smoothing_acts_where_the_settings_say(name: LossType) -> None:
    terms = PairTerms.split(LOGPS, REFERENCE, TOKENS)
    acts = not torch.equal(
        LOSSES[name](terms, spec()), LOSSES[name](terms, spec(label_smoothing=0.2))
    )
    assert acts == (name in SMOOTHED)


@NAMES
@pytest.mark.parametrize("divergence", get_args(FDivergence)[1:])
def test_an_f_divergence_acts_where_the_settings_say(
    name: LossType, divergence: FDivergence
) -> None:
    terms = PairTerms.split(LOGPS, REFERENCE, TOKENS)
    acts = not torch.equal(
        LOSSES[name](terms, spec()), LOSSES[name](terms, spec(f_divergence_type=divergence))
    )
    assert acts == (name in OF_SCORES and name != "sft")  # which has none, and takes any


@pytest.mark.parametrize("name", ["robust", "cdpo"])
def test_labels_that_are_never_wrong_give_dpo(name: LossType) -> None:
    assert of(name, label_smoothing=0.0) == of("sigmoid")


@pytest.mark.parametrize("name", ["cdpo", "exo_pair"])
def test_a_smoothed_loss_is_least_where_the_margin_says_how_sure_the_label_is(
    name: LossType,
) -> None:
    """sigmoid(margin) = 1 - epsilon: there the gradient is 0, and on either side points to it."""
    at = torch.tensor([TILT - 0.1, TILT, TILT + 0.1], dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    _, by_chosen, _ = slopes(
        name, PairTerms(at, zero, zero, zero, TOKENS[:3], TOKENS[3:], at), spec(1.0)
    )
    assert by_chosen.sign().tolist()[::2] == [-1, 1]
    assert by_chosen[1].item() == pytest.approx(0, abs=1e-15)


def test_alpha_divergences_lead_from_the_forward_to_the_reverse_kl() -> None:
    alpha = {"f_divergence_type": "alpha_divergence"}
    assert of("sigmoid", **alpha, f_alpha_divergence_coef=0.0) == of(
        "sigmoid", f_divergence_type="forward_kl"
    )
    assert of("sigmoid", **alpha, f_alpha_divergence_coef=1.0) == of("sigmoid")
    assert of("sigmoid", **alpha, f_alpha_divergence_coef=1 + 2e-6) == pytest.approx(
        of("sigmoid"), rel=1e-5
    )
    assert of("sigmoid", **alpha) != pytest.approx(of("sigmoid"), rel=1e-2)


def test_a_cold_discopop_is_exponential_where_the_chosen_leads_and_logistic_where_not() -> None:
    ahead, behind, _ = of("discopop", discopop_tau=1e-4)
    assert [ahead, behind] == pytest.approx([math.exp(-0.3), of("sigmoid")[1]], rel=1e-14)


# --- several at once ------------------------------------------------------------------------------


def test_the_sum_of_several_losses_and_its_mean_over_tokens() -> None:
    """sft is a mean over the 9 chosen tokens of a global batch of 5 pairs, of which 3 are here."""
    terms, counts = PairTerms.split(LOGPS, REFERENCE, TOKENS), Counts(5, 9)
    dpo = spec(loss_type=["sigmoid", "sft", "ipo"], loss_weights=[0.5, 2, -1])
    actual = pair_losses(terms, dpo, counts).sum() / counts.pairs
    expected = (0.5 * sum(of("sigmoid")) - sum(of("ipo"))) / 5 + 2 * (10 + 20 + 7) / 9
    assert actual.item() == pytest.approx(expected, rel=1e-14)


def test_one_loss_alone_is_itself_to_the_last_bit() -> None:
    terms = PairTerms.split(LOGPS, REFERENCE, TOKENS)
    assert pair_losses(terms, spec(), Counts(7, 1)).tolist() == of("sigmoid")


def test_a_batch_without_a_chosen_token_has_no_sft_loss_of_its_own() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    terms = PairTerms.split(zero, zero, torch.zeros(2, dtype=torch.int64))
    assert pair_losses(terms, spec(loss_type="sft"), Counts(1, 0)).tolist() == [0.0]


def test_weighting_multiplies_the_loss_of_each_pair_and_takes_no_part_in_its_slope() -> None:
    terms = PairTerms.split(LOGPS, REFERENCE, TOKENS)._replace(
        on_policy=torch.tensor([0.5, 2.0, 0.25]).double()
    )
    values = pair_losses(
        terms, spec(loss_type=["sigmoid", "ipo"], use_weighting=True), Counts(3, 9)
    )
    both = [first + second for first, second in zip(of("sigmoid"), of("ipo"), strict=True)]
    assert values.tolist() == pytest.approx([0.5 * both[0], 2 * both[1], 0.25 * both[2]], rel=1e-14)


def test_sft_counts_every_token_alike_whatever_ld_alpha_is() -> None:
    terms = PairTerms.split(LOGPS, REFERENCE, TOKENS)._replace(
        chosen_token_sum=torch.tensor([-11.0, -22.0, -8.0])
    )
    assert LOSSES["sft"](terms, spec(ld_alpha=0.5)).tolist() == [11, 22, 8]


# --- margins of the data --------------------------------------------------------------------------


@NAMES
def test_a_margin_is_what_the_chosen_is_to_win_by_in_rewards(name: LossType) -> None:
    """It acts as if the chosen completion had earned as much less, or per token for a loss over
    means.
    """
    terms, dpo = PairTerms.split(LOGPS, REFERENCE, TOKENS), spec(0.3)
    margins = torch.tensor([0.6, -0.3, 1.5], dtype=torch.float64)
    values = LOSSES[name](terms._replace(margins=margins), dpo)
    if name not in WITH_MARGIN:
        assert torch.equal(values, LOSSES[name](terms, dpo))
        return
    per_token = terms.chosen_tokens if LOSS_TRAITS[name].beta_is_per_token else 1
    lower = terms._replace(chosen_logps=terms.chosen_logps - margins / 0.3 * per_token)
    is_shift = torch.allclose(values, LOSSES[name](lower, dpo), rtol=1e-13)
    assert is_shift, f"{name}: the margin is not a shift of the chosen reward"


# --- numerical extremes ---------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", get_args(FDivergence))
@NAMES
def test_extreme_log_ratios_leave_loss_and_gradient_finite(
    name: LossType, divergence: FDivergence
) -> None:
    """Up to 1e4 nats of either sign on either side: what the policy rules out, or what the
    reference does.
    """
    ends = [-1e4, -800.0, -90.0, -1.0, -1e-9, 0.0]
    sides = torch.tensor(list(product(ends, repeat=4)), dtype=torch.float64).t()
    tokens = torch.full((sides.shape[1],), 3)
    terms = PairTerms(*sides, tokens, tokens, sides[0])
    for alpha in (-1.0, 0.5, 2.0):
        dpo = spec(1.0, f_divergence_type=divergence, f_alpha_divergence_coef=alpha)
        for tau in (0.05, 2.0):
            slope = slopes(name, terms, dpo.model_copy(update={"discopop_tau": tau}))
            assert all(each.isfinite().all() for each in slope)


def test_a_warm_discopop_has_its_product_where_one_factor_is_beyond_the_cap() -> None:
    far = torch.tensor([-120.0, 0.0], dtype=torch.float64)
    terms = PairTerms.split(
        far, torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.int64)
    )
    loss = LOSSES["discopop"](terms, spec(1.0, discopop_tau=2.0)).item()
    assert loss == pytest.approx(math.exp(120) / (1 + math.exp(60)), rel=1e-12)


def test_a_preference_that_is_lost_by_far_still_has_its_whole_gradient() -> None:
    lost = torch.tensor([-1e4, 0.0], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    terms = PairTerms.split(lost, zero, torch.ones(2, dtype=torch.int64))
    steepest: dict[LossType, float] = {
        "sigmoid": -1,
        "hinge": -1,
        "robust": -(1 - EPSILON) / (1 - 2 * EPSILON),
        "cdpo": -(1 - EPSILON),
        "bco_pair": -1,
        "discopop": -1,
    }
    for name, slope in steepest.items():
        _, by_chosen, _ = slopes(name, terms, spec(1.0))
        assert by_chosen.item() == pytest.approx(slope), name


@pytest.mark.parametrize(("margin", "expected"), [(1e5, 0.0), (-1e5, 1e5)])
def test_extreme_margins_neither_overflow_nor_lose_their_gradient(
    margin: float, expected: float
) -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    logps = torch.tensor([margin, 0.0], dtype=torch.float64, requires_grad=True)
    loss = LOSSES["sigmoid"](PairTerms.split(logps, zero, TOKENS[:2]), spec(1.0)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert logps.grad is not None
    assert logps.grad.isfinite().all()
    assert logps.grad[0].item() == pytest.approx(0.0 if margin > 0 else -1.0)
