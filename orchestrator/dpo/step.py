"""PairStep, the module that an engine wraps: policy body, reference, head and loss.

Legend: B pairs, 2B sequences (chosen half first), R rows, T tokens, H hidden size, C completion
tokens.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from orchestrator.data.collate import Counts, PairBatch
from orchestrator.dpo.losses import PairTerms, as_known, pair_losses, rewards
from orchestrator.models.head import TokenTerms, loss_in_head
from orchestrator.models.layers import captured_at
from orchestrator.models.logps import body_hidden
from orchestrator.models.reference import Reference
from orchestrator.models.storage import stored_tensors
from orchestrator.models.sums import PairSums, sequence_sums
from orchestrator.settings.loss import DpoSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PairValues(NamedTuple):
    """Values of a micro-batch, of which the metrics of a pair are functions."""

    losses: torch.Tensor  # [B]
    chosen_rewards: torch.Tensor  # [B]
    rejected_rewards: torch.Tensor  # [B]
    terms: PairTerms


PAIR_METRICS: dict[str, Callable[[PairValues], torch.Tensor]] = {
    "loss": lambda values: values.losses,
    "rewards/chosen": lambda values: values.chosen_rewards,
    "rewards/rejected": lambda values: values.rejected_rewards,
    "rewards/accuracies": lambda values: (values.chosen_rewards > values.rejected_rewards).double(),
    "rewards/margins": lambda values: values.chosen_rewards - values.rejected_rewards,
    "logps/chosen": lambda values: values.terms.chosen_logps,
    "logps/rejected": lambda values: values.terms.rejected_logps,
}
"""The metrics of each pair [B], with TRL's names; their means count each pair by its weight."""

TOKEN_METRICS = ("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy")
# In the order of metric_sums, each as a sum and the count that divides it.
METRICS = (*PAIR_METRICS, *TOKEN_METRICS, "num_tokens")


class StepOutput(NamedTuple):
    """The output of a micro-batch; a NamedTuple, because DeepSpeed's hooks traverse tuples but not
    dataclasses.
    """

    # scalar fp64: summed over the micro-batch, divided by the GLOBAL count; to be summed over ranks
    loss: torch.Tensor
    metric_sums: torch.Tensor  # [len(METRICS), 2] fp64 sums and counts
    logps: torch.Tensor  # [2B] fp64
    ref_logps: torch.Tensor  # [2B] fp64
    losses: torch.Tensor  # [B] fp64, each pair's term in the mean, without its weight


class PairStep(nn.Module):
    """One DPO forward pass over a micro-batch. Its only parameters are the policy's, unless the
    engine shards the reference with it.
    """

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
        # not an nn.Module: neither wrapped nor trained with the policy; saved only if it is synced
        self.reference = reference
        # modules of a reference that a sharding engine shards with the policy; these names are
        # not in checkpoints, which say reference.NAME
        self.reference_modules = nn.ModuleList(
            reference.own_modules(policy) if shard_reference else []
        )
        self.dpo, self.token_metrics = dpo, token_metrics
        # an fp32 reference beside a policy with 16-bit weights computes in the same precision
        self.reference_arithmetic: Callable[[], AbstractContextManager[Any]] = nullcontext

    def forward(
        self,
        batch: PairBatch | None,
        counts: Counts | None,
        function: Callable[[], Any] | None = None,
    ) -> StepOutput | tuple[Any]:
        """Compute loss and metrics of [B] pairs.

        counts: those of the global batch, so that no caller divides again.

        function: called instead of a step; its result is returned in a tuple. A sharding engine
        gathers the weights only within this forward pass.
        """
        if function is not None:
            return (function(),)  # DeepSpeed's hooks traverse the output of a module
        assert batch is not None
        assert counts is not None
        ref_logps = batch.ref_logps
        layer = self.reference.capture_layer if ref_logps is None else None
        with captured_at(self.policy, layer) as captured:
            hidden = body_hidden(self.policy, batch)
        if ref_logps is None:
            ref_logps = self.reference_logps(batch, *captured)
        losses = _Losses.of(batch, ref_logps, self.dpo, counts)
        scored = loss_in_head(
            self.policy,
            hidden,
            batch,
            losses.shares,
            self.token_metrics,
            self.dpo.ld_alpha,
            self.dpo.use_weighting,
        )
        terms = losses.terms(slice(None), scored.sums)
        per_pair = losses.per_pair(slice(None), scored.sums)
        metric_sums = self._metric_sums(batch, scored.tokens, terms, per_pair)
        return StepOutput(scored.loss, metric_sums, scored.logps, ref_logps, per_pair)

    def train(self, mode: bool = True) -> "PairStep":
        """Set the mode of the policy only: the reference never uses dropout."""
        super().train(mode)
        self.reference_modules.eval()
        return self

    # --- the life of the reference, in the order that models/reference.py lists -------------------

    def place_reference(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Move the reference's own weights to the device, cast to a dtype (None: keep theirs)."""
        self.reference.place(self.policy, device, dtype)

    def begin_training(self) -> None:
        """Keep only the reference that the steps use; the error has been measured and the cache
        filled.
        """
        self.reference = self.reference.begin_training()

    def reference_logps(self, batch: PairBatch, *captured: torch.Tensor) -> torch.Tensor:
        """Return the reference's log-probs [2B].

        captured: the input of capture_layer in the policy, if that ran.
        """
        with self.reference_arithmetic():
            return self.reference.logps(batch, *captured)

    def sync_reference(
        self,
        policy_weights: Mapping[str, torch.Tensor],
        alpha: float,
        held: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight,
    ) -> None:
        """Set reference = alpha * policy + (1 - alpha) * reference; see `Reference.sync`."""
        self.reference.sync(policy_weights, alpha, held)

    # --- checkpoints ------------------------------------------------------------------------------

    def saved(self) -> dict[str, torch.Tensor]:
        """Return the tensors that a checkpoint holds, by name: the policy's parameters and
        persistent buffers, or with LoRA only the parameters of its adapters (the base is loaded
        again, and identified by its hash), and the weights of a reference that is synced.
        """
        policy = stored_tensors(self.policy)
        if adapters := {name: p for name, p in policy.items() if ".lora_" in name}:
            policy = adapters
        synced = self.reference.synced_weights()
        return policy | {f"reference.{name}": value for name, value in synced.items()}

    # --- metrics ----------------------------------------------------------------------------------

    @torch.no_grad()
    def _metric_sums(
        self, batch: PairBatch, tokens: TokenTerms | None, terms: PairTerms, losses: torch.Tensor
    ) -> torch.Tensor:
        """Return the sums and counts of all metrics, [len(METRICS), 2]."""
        weights = batch.pair_weights
        values = PairValues(losses, *rewards(terms, self.dpo), terms)
        per_pair = torch.stack([metric(values) for metric in PAIR_METRICS.values()])
        pair_sums = torch.stack([per_pair @ weights, weights.sum().expand(len(per_pair))], dim=1)

        # independent of pair weights
        fed = (batch.sequence_tokens * (weights > 0).double().repeat(2)).sum().view(1)
        token_sums = fed.new_zeros(len(TOKEN_METRICS), 2)
        if tokens is not None:
            token_sums = self._token_sums(batch, tokens)
        return torch.cat([pair_sums, token_sums, torch.stack([fed, torch.ones_like(fed)], dim=1)])

    def _token_sums(self, batch: PairBatch, tokens: TokenTerms) -> torch.Tensor:
        """Return the sums and counts of the token metrics, [len(TOKEN_METRICS), 2]."""
        values = torch.stack([torch.ones_like(tokens.entropy), *tokens])
        lengths, entropy, logits, top1 = (
            (sequence_sums(values, batch) * batch.pair_weights.repeat(2))
            .unflatten(-1, (2, -1))
            .sum(-1)
        )
        sums = torch.stack([*logits, entropy.sum(), top1[0]])
        return torch.stack([sums, torch.stack([*lengths, lengths.sum(), lengths[0]])], dim=1)


class _Losses(NamedTuple):
    """The losses of a micro-batch as a function of the policy's log-probs."""

    known: PairTerms  # with the reference's log-probs
    of_batch: torch.Tensor | None  # [B, 3] see PairBatch.of_batch
    weights: torch.Tensor  # [B]
    dpo: DpoSpec
    counts: Counts

    @classmethod
    def of(
        cls, batch: PairBatch, ref_logps: torch.Tensor, dpo: DpoSpec, counts: Counts
    ) -> "_Losses":
        """Return the losses of a batch. ref_logps: [2B]."""
        no_logps = torch.zeros_like(ref_logps)
        known = PairTerms.split(no_logps, ref_logps, batch.completion_tokens, batch.margins)
        of_batch = batch.of_batch
        # not known until all of the batch is evaluated
        if dpo.needs_whole_batch and of_batch is None:
            of_batch = ref_logps.new_zeros(len(batch.pair_ids), 3)
        return cls(known, of_batch, batch.pair_weights, dpo, counts)

    def terms(self, pairs: slice, sums: PairSums) -> PairTerms:
        """Return the inputs of the losses of some pairs."""
        chosen, rejected = sums.logps.unbind(1)
        on_policy = None if sums.aligned is None else sums.aligned.sum(1).exp()
        return self.known.of(pairs)._replace(
            chosen_logps=chosen,
            rejected_logps=rejected,
            chosen_token_sum=sums.chosen,
            on_policy=on_policy,
        )

    def per_pair(self, pairs: slice, sums: PairSums) -> torch.Tensor:
        """Return the loss of each of some pairs."""
        losses = pair_losses(self.terms(pairs, sums), self.dpo, self.counts)
        if self.of_batch is None:
            return losses
        return losses + as_known(self.of_batch[pairs], sums.logps)

    def shares(self, pairs: slice, sums: PairSums) -> torch.Tensor:
        """Return the contribution of each of some pairs to the loss of the global batch."""
        return self.per_pair(pairs, sums) * self.weights[pairs] / self.counts.pairs
