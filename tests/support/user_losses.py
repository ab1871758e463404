"""Losses as users write them, for dpo.loss_type."""

import torch
from torch.nn.functional import logsigmoid

from orchestrator.dpo.losses import PairTerms
from orchestrator.settings.loss import DpoSpec


def demanding(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """[B] -log sigmoid(b (r_w - r_l) - 1 - margin)."""
    chosen, rejected = (
        terms.chosen_logps - terms.ref_chosen_logps,
        terms.rejected_logps - terms.ref_rejected_logps,
    )
    options = 1 if terms.margins is None else 1 + terms.margins
    return -logsigmoid(dpo.beta * (chosen - rejected) - options)


# --- each one of TRL's as well: see parity/test_losses.py


def logistic(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """sigmoid."""
    policys = terms.chosen_logps - terms.rejected_logps
    return -logsigmoid(dpo.beta * (policys - terms.ref_chosen_logps + terms.ref_rejected_logps))


def squared(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """ipo, of means per token."""
    chosen = (terms.chosen_logps - terms.ref_chosen_logps) / terms.chosen_tokens
    rejected = (terms.rejected_logps - terms.ref_rejected_logps) / terms.rejected_tokens
    return (chosen - rejected - 1 / (2 * dpo.beta)) ** 2


def absolute(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """bco_pair, which is no function of the margin."""
    chosen, rejected = (
        terms.chosen_logps - terms.ref_chosen_logps,
        terms.rejected_logps - terms.ref_rejected_logps,
    )
    return -logsigmoid(dpo.beta * chosen) - logsigmoid(-dpo.beta * rejected)
