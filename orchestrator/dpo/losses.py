"""Compute the loss and the rewards of each pair from its log-probs, for each loss type.

Legend: B pairs. Everything is fp64: there are only a few numbers per pair, and their differences
matter. In equations r_w and r_l are the log-ratios log(policy / reference) of chosen and rejected,
s_w and s_l their scores (see `scores`; equal to the log-ratios with
dpo.f_divergence_type=reverse_kl), b is dpo.beta, e is dpo.label_smoothing and |y| the number of
completion tokens; other letters are settings of one loss, in its `own_settings`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.functional import logsigmoid

from orchestrator.data.collate import Counts
from orchestrator.settings.loss import DpoSpec
from orchestrator.user_code import call_user_code, user_attribute

MAX_EXPONENT = 80.0
"""Cap of exponents, as in TRL's alpha divergence: the head's gradient is fp32, which can hold
exp(80) but not exp(89). Exponents above it have no gradient.
"""


class PairTerms(NamedTuple):
    """The inputs of a loss, all [B]: log-probs summed over completion tokens, where those beyond
    the shorter completion of a pair have weight dpo.ld_alpha (LD-DPO: Liu et al. 2024, arXiv
    2409.06411, eq. 10).
    """

    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    ref_chosen_logps: torch.Tensor
    ref_rejected_logps: torch.Tensor
    # of the completion, also its first one, which an empty prompt leaves unscored
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    chosen_token_sum: torch.Tensor  # chosen_logps with weight 1 for every token
    margins: torch.Tensor | None = None  # values of data.margin_column, if it is set
    # with dpo.use_weighting: the factor of the pair's loss, without gradient
    on_policy: torch.Tensor | None = None

    @classmethod
    def split(
        cls,
        logps: torch.Tensor,
        ref_logps: torch.Tensor,
        tokens: torch.Tensor,
        margins: torch.Tensor | None = None,
    ) -> "PairTerms":
        """Build the terms from [2B] tensors, chosen half first, with weight 1 for every token.

        margins: [B].
        """
        halves = [half for both in (logps, ref_logps, tokens) for half in both.chunk(2)]
        return cls(*halves, chosen_token_sum=halves[0], margins=margins)

    def of(self, pairs: slice) -> "PairTerms":
        """Return the terms of a slice of the pairs."""
        terms: Any = (None if term is None else term[pairs] for term in self)
        return PairTerms(*terms)


Loss = Callable[[PairTerms, DpoSpec], torch.Tensor]
BatchLoss = Callable[[PairTerms, DpoSpec, torch.Tensor], torch.Tensor]
"""(all N pairs of the global batch, settings, the pairs' weights [N]) -> [N] the loss of each."""
Both = tuple[torch.Tensor, torch.Tensor]
"""[B] of the chosen, [B] of the rejected."""


def pair_losses(terms: PairTerms, dpo: DpoSpec, counts: Counts) -> torch.Tensor:
    """Return the weighted sum [B] of the losses in the settings, without those of `batch_losses`.

    Its mean over the pairs of the GLOBAL batch (`counts`) is the loss of the step. Several losses:
    MPO, Wang et al. 2024, arXiv 2411.10442, section 3.2.

    With dpo.use_weighting each is multiplied by the probability of the pair under the policy,
    w(y_w) w(y_l), where log w(y) is the mean over tokens of log p(token) - log(sum of p^2). WPO:
    Zhou et al. 2024, arXiv 2406.11827, eq. 2.
    """
    total = torch.zeros_like(terms.chosen_logps)
    for name, traits, weight in zip(dpo.loss_types, dpo.traits, dpo.weights, strict=True):
        if traits.needs_whole_batch:
            continue
        losses = loss_of(name)(terms, dpo)
        if traits.is_token_mean:
            losses = losses * (counts.pairs / (counts.chosen_tokens or 1))
        total = total + weight * losses
    return total if terms.on_policy is None else terms.on_policy * total


def loss_of(name: str) -> Loss:
    """Return the loss of that name, or the user's loss of that module:attr."""
    return LOSSES[name] if name in LOSSES else partial(_user_loss, name)


def _user_loss(name: str, terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """Import and call a user's loss."""
    loss = user_attribute("dpo.loss_type", name)
    return call_user_code(
        "dpo.loss_type", name, f"for {len(terms.chosen_logps)} pairs", loss, terms, dpo
    )


def log_ratios(terms: PairTerms) -> Both:
    """Return r_w and r_l."""
    return (
        terms.chosen_logps - terms.ref_chosen_logps,
        terms.rejected_logps - terms.ref_rejected_logps,
    )


def rewards(terms: PairTerms, dpo: DpoSpec) -> Both:
    """Return b r_w and b r_l, for every loss type, as in TRL."""
    chosen, rejected = log_ratios(terms)
    return dpo.beta * chosen, dpo.beta * rejected


def scores(terms: PairTerms, dpo: DpoSpec) -> Both:
    """Return s_w and s_l: f'(t) at t = policy / reference = exp(r), where f is that of
    dpo.f_divergence_type.

    Wang et al. 2023 (f-DPO), arXiv 2309.16240, table 1; the alpha divergence is TRL's.
    """
    chosen, rejected = log_ratios(terms)
    return _score(chosen, dpo), _score(rejected, dpo)


def _score(log_ratio: torch.Tensor, dpo: DpoSpec) -> torch.Tensor:
    if dpo.f_divergence_type == "forward_kl":  # 1 - 1 / t
        return -torch.expm1(_capped(-log_ratio))
    if dpo.f_divergence_type == "js_divergence":  # log(2 t / (t + 1))
        return math.log(2) + logsigmoid(log_ratio)
    power = dpo.f_alpha_divergence_coef - 1
    # log t, the limit of the next for power 0
    if dpo.f_divergence_type == "reverse_kl" or abs(power) < 1e-6:
        return log_ratio
    return torch.expm1(_capped(power * log_ratio)) / power  # (t^power - 1) / power


def _capped(exponent: torch.Tensor) -> torch.Tensor:
    return exponent.clamp(max=MAX_EXPONENT)


def _margin(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """Return b (s_w - s_l), [B], minus the pair's margin."""
    chosen, rejected = scores(terms, dpo)
    return _less_margin(dpo.beta * (chosen - rejected), terms)


def _less_margin(margin: torch.Tensor, terms: PairTerms) -> torch.Tensor:
    """Return the difference of rewards minus its offset from the data, [B]. ODPO: Amini et al.
    2024, arXiv 2402.10571, the loss of that name.
    """
    return margin if terms.margins is None else margin - terms.margins


def _per_token(both: Both, terms: PairTerms) -> Both:
    """Divide by |y_w| and |y_l|; by 1 if a user's collator removed a completion, where 0 / 0 would
    be NaN.
    """
    chosen, rejected = both
    return chosen / terms.chosen_tokens.clamp(min=1), rejected / terms.rejected_tokens.clamp(min=1)


def _smoothed(margin: torch.Tensor, dpo: DpoSpec) -> torch.Tensor:
    """Return -(1 - e) log sigmoid(m) - e log sigmoid(-m)."""
    return -(1 - dpo.label_smoothing) * logsigmoid(margin) - dpo.label_smoothing * logsigmoid(
        -margin
    )


# --- TRL's losses ---------------------------------------------------------------------------------


def sigmoid(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """Return the DPO loss [B]: -log sigmoid(b (s_w - s_l)).

    Rafailov et al. 2023, arXiv 2305.18290, eq. 7.
    """
    return -logsigmoid(_margin(terms, dpo))


def hinge(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """Return the SLiC loss [B]: max(0, 1 - b (s_w - s_l)). Zhao et al. 2023, arXiv 2305.10425, over
    log-ratios as in RSO, Liu et al. 2023, arXiv 2309.06657, eq. 10.
    """
    return torch.relu(1 - _margin(terms, dpo))


def ipo(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """Return the IPO loss [B]: (s_w / |y_w| - s_l / |y_l| - 1 / (2 b))^2. Azar et al. 2023, arXiv
    2310.12036, eq. 17; per completion token, as its authors recommended to TRL.
    """
    chosen, rejected = _per_token(scores(terms, dpo), terms)
    return (chosen - rejected - 1 / (2 * dpo.beta)) ** 2


def exo_pair(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """Return the EXO loss [B]: KL(p, q) of p = sigmoid(+-b (s_w - s_l)) from the label's q = (1 -
    e, e). Ji et al. 2024, arXiv 2402.00856, eq. 16.
    """
    margin, label = _margin(terms, dpo), dpo.label_smoothing
    chosen = torch.sigmoid(margin) * (logsigmoid(margin) - math.log1p(-label))
    return chosen + torch.sigmoid(-margin) * (logsigmoid(-margin) - math.log(label))


def nca_pair(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """Return the NCA loss [B]: -log sigmoid(b r_w) - (log sigmoid(-b r_w) + log sigmoid(-b r_l)) /
    2. Chen et al. 2024, arXiv 2402.05369, table 1.
    """
    chosen, rejected = rewards(terms, dpo)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def robust(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """Return the robust DPO loss [B]: with m = b (s_w - s_l), (-(1 - e) log sigmoid(m) + e log
    sigmoid(-m)) / (1 - 2 e), where a label is wrong with probability e < 1/2. Chowdhury et al.
    2024, arXiv 2403.00409, its de-biased loss.
    """
    margin, flipped = _margin(terms, dpo), dpo.label_smoothing
    return (flipped * logsigmoid(-margin) - (1 - flipped) * logsigmoid(margin)) / (1 - 2 * flipped)


def bco_pair(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """Return the BCO loss [B] without its shift of rewards: -log sigmoid(b r_w) - log sigmoid(-b
    r_l). Jung et al. 2024, arXiv 2404.04656, eq. 6.
    """
    chosen, rejected = rewards(terms, dpo)
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def sppo_hard(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """Return the SPPO loss [B]: (r_w - 1 / (2 b))^2 + (r_l + 1 / (2 b))^2, where the chosen wins
    with probability 1. Wu et al. 2024, arXiv 2405.00675, eq. 4.7.
    """
    chosen, rejected = log_ratios(terms)
    return (chosen - 0.5 / dpo.beta) ** 2 + (rejected + 0.5 / dpo.beta) ** 2


def apo_zero(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """Return the APO-zero loss [B], for chosen completions better than the model's: 1 - sigmoid(b
    r_w) + sigmoid(b r_l). D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7.
    """
    chosen, rejected = rewards(terms, dpo)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """Return the APO-down loss [B], for chosen completions worse than the model's: sigmoid(b r_w) +
    1 - sigmoid(b (r_w - r_l)). D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8.
    """
    chosen, rejected = rewards(terms, dpo)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def discopop(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """Return the DiscoPOP loss [B]: with m = b (s_w - s_l) and g = sigmoid(m / tau), -(1 - g) log
    sigmoid(m) + g exp(-m). Lu et al. 2024, arXiv 2406.08414, eq. 5.
    """
    margin = _margin(terms, dpo)
    ratio = margin / dpo.discopop_tau
    # g exp(-m) as one exponential: for m far below 0 the product would be 0 times infinity
    exponential = torch.exp(_capped(logsigmoid(ratio) - margin))
    return exponential - torch.sigmoid(-ratio) * logsigmoid(margin)


def sft(terms: PairTerms, _: DpoSpec) -> torch.Tensor:
    """Return -log p_w, [B], whose mean is over all chosen tokens of the global batch. Added to
    sigmoid it is RPO, as in TRL: Pang et al. 2024, arXiv 2404.19733, eq. 1.
    """
    return -terms.chosen_token_sum


def sigmoid_norm(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """Return the length-normalised DPO loss [B]: -log sigmoid(b (s_w / |y_w| - s_l / |y_l|)).
    Lambert et al. 2024 (Tülu 3), arXiv 2411.15124, eq. 6.
    """
    chosen, rejected = _per_token(scores(terms, dpo), terms)
    return -logsigmoid(_less_margin(dpo.beta * (chosen - rejected), terms))


# --- losses by their common names -----------------------------------------------------------------


def cdpo(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """Return the conservative DPO loss [B]: with m = b (s_w - s_l), -(1 - e) log sigmoid(m) - e log
    sigmoid(-m). Mitchell 2023, A note on DPO with noisy preferences & relationship to IPO,
    https://ericmitchell.ai/cdpo.pdf, eq. 3. In earlier releases of TRL this was sigmoid with
    label_smoothing, which it now ignores.
    """
    return _smoothed(_margin(terms, dpo), dpo)


def simpo(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """Return the SimPO loss [B]: -log sigmoid(b (log p_w / |y_w| - log p_l / |y_l|) - gamma),
    smoothed as in cDPO, without a reference. Meng et al. 2024, arXiv 2405.14734, eq. 6; equal to
    TRL's CPOTrainer with cpo_alpha=0.
    """
    chosen, rejected = _per_token((terms.chosen_logps, terms.rejected_logps), terms)
    return _smoothed(_less_margin(dpo.beta * (chosen - rejected) - dpo.simpo_gamma, terms), dpo)


def orpo(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """Return the ORPO loss [B]: with q = log p / |y| of each completion, -q_w - b log sigmoid(log
    odds(q_w) - log odds(q_l)), where log odds(q) is q - log(1 - exp(q)), without a reference. Hong
    et al. 2024, arXiv 2403.07691, eq. 6 and 7. The second term equals that of TRL's ORPOTrainer,
    whose first one includes the prompt's tokens.
    """
    means = _per_token((terms.chosen_logps, terms.rejected_logps), terms)
    chosen, rejected = map(_log_odds, means)
    return -means[0] - dpo.beta * logsigmoid(chosen - rejected)


def _log_odds(logp: torch.Tensor) -> torch.Tensor:
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)  # at probability 1 the odds are infinite
    return logp - torch.log(-torch.expm1(logp))


# --- losses over the whole global batch -----------------------------------------------------------


def aot(terms: PairTerms, dpo: DpoSpec, weights: torch.Tensor) -> torch.Tensor:
    """Return the paired AOT loss [N]: with d_(k) the k-th smallest log(p_w / p_l) of the policy and
    c_(k) that of the reference, m = b (d_(k) - c_(k)): -(1 - e) log sigmoid(m) - e log sigmoid(-m).
    Melnyk et al. 2024, arXiv 2406.05882, the AOT objective for paired data, in its closed form by
    sorting, with the logistic penalty.
    """
    of_policy = terms.chosen_logps - terms.rejected_logps
    of_reference = terms.ref_chosen_logps - terms.ref_rejected_logps
    return _matched(of_policy, of_reference, dpo, weights)


def aot_unpaired(terms: PairTerms, dpo: DpoSpec, weights: torch.Tensor) -> torch.Tensor:
    """Return the unpaired AOT loss [N]: the same for the k-th smallest r_w and the k-th smallest
    r_l. Melnyk et al. 2024, arXiv 2406.05882, the AOT objective for unpaired data.
    """
    chosen, rejected = log_ratios(terms)
    return _matched(chosen, rejected, dpo, weights)


def _matched(
    upper: torch.Tensor, lower: torch.Tensor, dpo: DpoSpec, weights: torch.Tensor
) -> torch.Tensor:
    """Return the loss [N] of each `upper`, which should exceed the `lower` of the same rank in the
    sorted order.

    It is the mean of loss(U(t) - L(t)) over the pair's part of t in [0, 1], where U and L are the
    quantile functions of both sides, in which each pair is as wide as its weight. An integer weight
    is equivalent to repeating the pair.
    """
    uppers, lowers = upper.detach().argsort(stable=True), lower.detach().argsort(stable=True)
    upper_ends, lower_ends = weights[uppers].cumsum(0), weights[lowers].cumsum(0)
    ends = torch.cat([upper_ends, lower_ends]).unique()  # ascending
    width = ends.diff(prepend=ends.new_zeros(1))
    last = len(weights) - 1  # the two totals may differ in the last bit
    i = uppers[torch.searchsorted(upper_ends, ends - width / 2).clamp(max=last)]
    j = lowers[torch.searchsorted(lower_ends, ends - width / 2).clamp(max=last)]
    losses = width * _smoothed(dpo.beta * (upper[i] - lower[j]), dpo)
    return torch.zeros_like(weights).index_add(0, i, losses) / weights


def batch_losses(terms: PairTerms, dpo: DpoSpec, weights: torch.Tensor) -> torch.Tensor:
    """Return the losses over the whole global batch for each of its pairs, none of which has weight
    0.

    Returns:
        [N, 3]: the weighted sum of the losses in the settings, and its derivatives by the log-probs
            of the chosen and of the rejected completion: d (mean of all pairs) / d logp, times the
            total weight, divided by the pair's.
    """
    chosen, rejected = (logps.detach().requires_grad_() for logps in terms[:2])
    with torch.enable_grad():
        terms = terms._replace(chosen_logps=chosen, rejected_logps=rejected)
        losses = sum(
            factor * BATCH_LOSSES[name](terms, dpo, weights)
            for name, factor in zip(dpo.loss_types, dpo.weights, strict=True)
            if name in BATCH_LOSSES
        )
        assert isinstance(losses, torch.Tensor)  # called only if the settings have such a loss
        slopes = torch.autograd.grad(losses @ weights, (chosen, rejected))
    return torch.stack([losses.detach(), *(slope / weights for slope in slopes)], dim=1)


def as_known(of_batch: torch.Tensor, logps: torch.Tensor) -> torch.Tensor:
    """Return the pairs' losses [b] over the global batch, with their gradient by logps [b, 2].

    of_batch: [b, 3].
    """
    return of_batch[:, 0] + (of_batch[:, 1:] * (logps - logps.detach())).sum(1)


LOSSES: dict[str, Loss] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
    "sigmoid_norm": sigmoid_norm,
    "cdpo": cdpo,
    "simpo": simpo,
    "orpo": orpo,
}
"""Losses that depend on one pair at a time, so that their gradient can be computed in the head."""

BATCH_LOSSES: dict[str, BatchLoss] = {"aot": aot, "aot_unpaired": aot_unpaired}
"""Losses that need the log-probs of the whole global batch, for which a step first runs all its
micro-batches once.
"""
