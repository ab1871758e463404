"""Losses as users write them, for dpo.loss_type."""

import torch
from torch.nn.functional import logsigmoid

from orchestrator.dpo.losses import PairTerms
from orchestrator.settings.spec import DpoSpec


def demanding(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """[B] -log sigmoid(b (r_w - r_l) - 1 - margin)."""
    chosen, rejected = terms.chosen_logps - terms.ref_chosen_logps, terms.rejected_logps - terms.ref_rejected_logps
    wanted = 1 if terms.margins is None else 1 + terms.margins
    return -logsigmoid(dpo.beta * (chosen - rejected) - wanted)
