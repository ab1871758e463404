"""PairStep: policy body, then reference, then head and loss; the one module that an engine wraps.

Legend: B pairs, 2B sequences (chosen half first), R rows, T tokens, H hidden size, C completion tokens.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from orchestrator.data.collate import Counts, PairBatch
from orchestrator.dpo.losses import PairTerms, as_known, pair_losses, rewards
from orchestrator.models.layers import captured_at
from orchestrator.models.logps import PairSums, TokenTerms, body_hidden, loss_in_head, sequence_sums
from orchestrator.models.reference import Reference
from orchestrator.models.storage import stored_tensors
from orchestrator.settings.spec import DpoSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKEN_METRICS = ("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy")
# Metrics with TRL's names, in the order of metric_sums. Each is a sum and the count that it is divided by.
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    *TOKEN_METRICS,
    "num_tokens",
)


class StepOutput(NamedTuple):
    """A NamedTuple, because DeepSpeed's hooks look into tuples but not into dataclasses."""

    loss: torch.Tensor  # scalar fp64: summed over the micro-batch, divided by the GLOBAL count; sum it over ranks
    metric_sums: torch.Tensor  # [len(METRICS), 2] fp64 sums and counts
    logps: torch.Tensor  # [2B] fp64
    ref_logps: torch.Tensor  # [2B] fp64
    losses: torch.Tensor  # [B] fp64, each pair's as it enters the mean, without its weight


class PairStep(nn.Module):
    """One DPO forward over a micro-batch. Its only parameters are the policy's, unless the reference is to be sharded
    with it."""

    def __init__(
        self,
        policy: "PreTrainedModel",
        reference: Reference,
        dpo: DpoSpec,
        token_metrics: bool = True,
        shard_reference: bool = False,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.reference = reference  # no nn.Module: neither wrapped, trained nor saved with the policy
        # its weights in this module's tree, where a sharding engine finds them; names nothing in a checkpoint
        self.judge = nn.ModuleList(reference.own_modules(policy) if shard_reference else [])
        self.dpo, self.token_metrics = dpo, token_metrics
        # a reference in fp32 beside a policy whose weights are of 16 bits computes in the same precision
        self.reference_arithmetic: Callable[[], AbstractContextManager[Any]] = nullcontext

    def forward(
        self, batch: PairBatch | None, counts: Counts | None, ask: Callable[[], Any] | None = None
    ) -> StepOutput | tuple[Any]:
        """Loss and metrics of [B] pairs; `counts` are the global batch's, so that no one has to divide again.

        ask: instead of a step, this is called, and its answer returned in a tuple: a sharding engine has the weights
        at hand nowhere but in here.
        """
        if ask is not None:
            return (ask(),)  # DeepSpeed's hooks look into what a module returns
        assert batch is not None
        assert counts is not None
        ref_logps = batch.ref_logps
        with captured_at(self.policy, self.reference.capture_layer if ref_logps is None else None) as captured:
            hidden = body_hidden(self.policy, batch)
        if ref_logps is None:
            ref_logps = self.ask_reference(batch, *captured)
        known = PairTerms.split(torch.zeros_like(ref_logps), ref_logps, batch.completion_tokens, batch.margins)

        def terms_of(pairs: slice, sums: PairSums) -> PairTerms:
            chosen, rejected = sums.logps.unbind(1)
            on_policy = None if sums.aligned is None else sums.aligned.sum(1).exp()
            return known.of(pairs)._replace(
                chosen_logps=chosen, rejected_logps=rejected, chosen_token_sum=sums.chosen, on_policy=on_policy
            )

        of_batch = batch.of_batch
        if self.dpo.sees_batch and of_batch is None:  # it is not known, before all of the batch was seen
            of_batch = ref_logps.new_zeros(len(batch.pair_ids), 3)

        def losses_of(pairs: slice, sums: PairSums) -> torch.Tensor:
            losses = pair_losses(terms_of(pairs, sums), self.dpo, counts)
            return losses if of_batch is None else losses + as_known(of_batch[pairs], sums.logps)

        def shares(pairs: slice, sums: PairSums) -> torch.Tensor:
            return losses_of(pairs, sums) * batch.pair_weights[pairs] / counts.pairs

        scored = loss_in_head(
            self.policy, hidden, batch, shares, self.token_metrics, self.dpo.ld_alpha, self.dpo.use_weighting
        )
        terms, losses = terms_of(slice(None), scored.sums), losses_of(slice(None), scored.sums)
        metric_sums = self._metric_sums(batch, scored.tokens, terms, losses)
        return StepOutput(scored.loss, metric_sums, scored.logps, ref_logps, losses)

    def train(self, mode: bool = True) -> "PairStep":
        """The policy alone: a reference, wherever it is held, has no dropout."""
        super().train(mode)
        self.judge.eval()
        return self

    def ask_reference(self, batch: PairBatch, *captured: torch.Tensor) -> torch.Tensor:
        """The reference's log-probs [2B]; captured: what entered its capture_layer in the policy, where it ran."""
        with self.reference_arithmetic():
            return self.reference(batch, *captured)

    def saved(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint keeps, by name: the policy's parameters and persistent buffers, of a LoRA policy the
        parameters of its adapters (the base can be loaded again, and is known by its hash); and the weights of a
        reference that moves."""
        policy = stored_tensors(self.policy)
        if adapters := {name: p for name, p in policy.items() if ".lora_" in name}:
            policy = adapters
        return policy | {f"reference.{name}": value for name, value in self.reference.moving().items()}

    @torch.no_grad()
    def _metric_sums(
        self, batch: PairBatch, tokens: TokenTerms | None, terms: PairTerms, losses: torch.Tensor
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

        fed = (batch.sequence_tokens * (weights > 0).double().repeat(2)).sum().view(1)  # whatever a pair weighs
        token_sums = self._token_sums(batch, tokens) if tokens is not None else fed.new_zeros(len(TOKEN_METRICS), 2)
        return torch.cat([pair_sums, token_sums, torch.stack([fed, torch.ones_like(fed)], dim=1)])

    def _token_sums(self, batch: PairBatch, tokens: TokenTerms) -> torch.Tensor:
        """[len(TOKEN_METRICS), 2]."""
        values = torch.stack([torch.ones_like(tokens.entropy), *tokens])
        lengths, entropy, logits, top1 = (
            (sequence_sums(values, batch) * batch.pair_weights.repeat(2)).unflatten(-1, (2, -1)).sum(-1)
        )
        sums = torch.stack([*logits, entropy.sum(), top1[0]])
        return torch.stack([sums, torch.stack([*lengths, lengths.sum(), lengths[0]])], dim=1)
