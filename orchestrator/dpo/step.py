"""PairStep: policy body, then reference, then head and loss; the one module that an engine wraps.

Legend: B pairs, 2B sequences (chosen half first), R rows, T tokens, H hidden size, C completion tokens.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from orchestrator.data.collate import Counts, PairBatch
from orchestrator.dpo.losses import LOSSES, PairTerms, rewards
from orchestrator.models.logps import TokenTerms, body_hidden, sequence_sums, token_terms
from orchestrator.models.reference import Reference
from orchestrator.settings.spec import DpoSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Metrics with TRL's names, in the order of metric_sums. Each is a sum and the count that it is divided by.
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
    "num_tokens",
)


class StepOutput(NamedTuple):
    """A NamedTuple, because DeepSpeed's hooks look into tuples but not into dataclasses."""

    loss: torch.Tensor  # scalar fp64: summed over the micro-batch, divided by the GLOBAL count; sum it over ranks
    metric_sums: torch.Tensor  # [len(METRICS), 2] fp64 sums and counts
    logps: torch.Tensor  # [2B] fp64
    ref_logps: torch.Tensor  # [2B] fp64


class PairStep(nn.Module):
    """One DPO forward over a micro-batch. Its only parameters are the policy's."""

    def __init__(self, policy: "PreTrainedModel", reference: Reference, dpo: DpoSpec) -> None:
        super().__init__()
        self.policy = policy
        self.reference = reference  # no nn.Module: neither wrapped, trained nor saved with the policy
        self.dpo = dpo

    def forward(self, batch: PairBatch, counts: Counts) -> StepOutput:
        """Loss and metrics of [B] pairs; `counts` are the global batch's, so that no one has to divide again."""
        hidden = body_hidden(self.policy, batch)
        ref_logps = batch.ref_logps if batch.ref_logps is not None else self.reference(batch)
        tokens = token_terms(self.policy, hidden, batch)
        logps = sequence_sums(tokens.logps, batch)
        terms = PairTerms.split(logps, ref_logps)
        losses = LOSSES[self.dpo.loss_type](terms, self.dpo)
        sums = self._metric_sums(batch, tokens, terms, losses)
        return StepOutput(losses @ batch.pair_weights / counts.pairs, sums, logps.detach(), ref_logps)

    @torch.no_grad()
    def _metric_sums(
        self, batch: PairBatch, tokens: TokenTerms, terms: PairTerms, losses: torch.Tensor
    ) -> torch.Tensor:
        weights = batch.pair_weights
        chosen, rejected = rewards(terms, self.dpo)
        per_pair = torch.stack(
            [
                losses,
                chosen,
                rejected,
                (chosen > rejected).double(),
                chosen - rejected,
                terms.chosen_logps,
                terms.rejected_logps,
            ]
        )
        pair_sums = torch.stack([per_pair @ weights, weights.sum().expand(len(per_pair))], dim=1)

        both = weights.repeat(2)
        lengths = sequence_sums(torch.ones_like(tokens.entropy), batch) * both  # [2B] scored tokens
        logits, entropy, top1 = (
            sequence_sums(values, batch) * both for values in (tokens.mean_logit, tokens.entropy, tokens.is_top1)
        )
        (n_chosen, n_rejected), fed = lengths.view(2, -1).sum(1), batch.attention_mask.sum(1).double() @ both
        logits_chosen, logits_rejected = logits.view(2, -1).sum(1)
        token_sums = torch.stack(
            [
                logits_chosen,
                n_chosen,
                logits_rejected,
                n_rejected,
                entropy.sum(),
                n_chosen + n_rejected,
                top1.chunk(2)[0].sum(),
                n_chosen,
                fed,
                torch.ones_like(fed),
            ]
        )
        return torch.cat([pair_sums, token_sums.view(-1, 2)])
