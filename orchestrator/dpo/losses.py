"""Log-probs of pairs -> loss and rewards of each pair, for each loss type.

Legend: B pairs. Everything is fp64: a handful of numbers per pair, whose differences matter.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from orchestrator.settings.spec import DpoSpec, LossType


class PairTerms(NamedTuple):
    """What a loss may see of the pairs, all [B]: log-probs summed over completion tokens."""

    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    ref_chosen_logps: torch.Tensor
    ref_rejected_logps: torch.Tensor
    chosen_tokens: torch.Tensor  # of the completion; an empty prompt leaves its first one unscored, yet counted here
    rejected_tokens: torch.Tensor

    @classmethod
    def split(cls, logps: torch.Tensor, ref_logps: torch.Tensor, tokens: torch.Tensor) -> "PairTerms":
        """From [2B] tensors, chosen half first."""
        return cls(*logps.chunk(2), *ref_logps.chunk(2), *tokens.chunk(2))

    def of(self, pairs: slice) -> "PairTerms":
        """The same of some pairs."""
        return PairTerms(*(term[pairs] for term in self))


Loss = Callable[[PairTerms, DpoSpec], torch.Tensor]


def rewards(terms: PairTerms, dpo: DpoSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """([B] chosen, [B] rejected): beta times the log-ratio, whatever the loss, as in TRL."""
    chosen = dpo.beta * (terms.chosen_logps - terms.ref_chosen_logps)
    return chosen, dpo.beta * (terms.rejected_logps - terms.ref_rejected_logps)


def sigmoid(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """[B] DPO: -log sigmoid(reward of chosen - reward of rejected). Rafailov et al. 2023, arXiv 2305.18290, eq. 7."""
    chosen, rejected = rewards(terms, dpo)
    return -logsigmoid(chosen - rejected)


def ipo(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """[B] IPO: (mean log-ratio of chosen - of rejected - 1 / (2 beta))^2. Azar et al. 2023, arXiv 2310.12036, eq. 17;
    log-ratios are per completion token, as its authors told TRL."""
    chosen = (terms.chosen_logps - terms.ref_chosen_logps) / terms.chosen_tokens.clamp(min=1)
    rejected = (terms.rejected_logps - terms.ref_rejected_logps) / terms.rejected_tokens.clamp(min=1)
    return (chosen - rejected - 1 / (2 * dpo.beta)) ** 2


LOSSES: dict[LossType, Loss] = {"sigmoid": sigmoid, "ipo": ipo}
"""Each looks at one pair at a time, so that its gradient can be formed in the head."""
