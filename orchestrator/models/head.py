"""Compute a batch's loss, log-probs and token metrics in the head, from hidden states.

Legend: B pairs, 2B sequences, R rows of the batch, T tokens of a row, H hidden size, C completion
tokens, n some of them, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from orchestrator.data.collate import PairBatch
from orchestrator.models.plain_head import LossInPlainHead, PairLosses, Scoring, rows_at_once
from orchestrator.models.sums import PairSums, Tails, pair_means, pair_sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Config keys of a factor or a cap of the logits, in Cohere, Falcon-H1; Granite, Inkling; Gemma,
# xLSTM.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class Head(NamedTuple):
    """The head of a causal LM: logits = cap * tanh(scale * module(hidden) / cap)."""

    module: torch.nn.Module
    vocabulary: int
    scale: float
    cap: float | None

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "Head":
        """Return the head of a causal LM; policy.py checks at start that its logits are the model's
        own.
        """
        module = model.get_output_embeddings()
        assert module is not None  # every causal LM has one
        text = model.config.get_text_config()
        scale = math.prod(getattr(text, name, None) or 1.0 for name in MULTIPLIERS)
        divisor = math.prod(getattr(text, name, None) or 1.0 for name in DIVISORS)
        if text.model_type == "hyperclovax":  # it multiplies by the factor that Granite divides by
            divisor = 1 / divisor
        caps = [cap for name in CAPS if (cap := getattr(text, name, None))]
        return cls(module, text.vocab_size, scale / divisor, caps[0] if caps else None)

    @property
    def is_plain(self) -> bool:
        """Return whether the logits are one matrix product, with a gradient in closed form."""
        module: Any = self.module
        is_linear = type(module) is torch.nn.Linear and module.bias is None
        return is_linear and self.cap is None and type(module.weight) is torch.nn.Parameter

    @contextmanager
    def weight_at_hand(self) -> Iterator[Any]:
        """Yield the weight [V, H] of a plain head on its device, even if accelerate offloads it
        between uses.
        """
        if not hasattr(self.module, "_hf_hook"):
            yield self.module.weight
            return
        from accelerate.utils import align_module_device

        with align_module_device(self.module):
            yield self.module.weight

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the logits: [n, H] -> [n, V], at least in fp32."""
        logits = self.module(hidden)
        logits = (logits if logits.dtype == torch.float64 else logits.float()) * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class TokenTerms(NamedTuple):
    """Metrics of each completion token from its logits, all [C] and without gradient."""

    entropy: torch.Tensor  # nats
    mean_logit: torch.Tensor  # over the vocabulary
    is_top1: torch.Tensor  # 1.0 where no token is more probable than the label


class Scored(NamedTuple):
    """The loss, sums and token metrics of a batch."""

    loss: torch.Tensor  # scalar fp64, with gradient
    sums: PairSums  # of all B pairs, without gradient
    tokens: TokenTerms | None

    @property
    def logps(self) -> torch.Tensor:
        """Return the log-probs of the sequences, [2B] fp64, all chosen first."""
        return self.sums.logps.t().flatten()


def loss_in_head(
    model: "PreTrainedModel",
    hidden: torch.Tensor,
    batch: PairBatch,
    pair_losses: PairLosses,
    with_metrics: bool,
    ld_alpha: float | None = None,
    with_aligned: bool = False,
) -> Scored:
    """Compute the loss of a batch, for losses that depend on one pair at a time. hidden: [R, T, H].

    At most plain_head.CHUNK_LOGITS logits (on a GPU more) are in memory at a time, in forward
    and backward.

    ld_alpha: see PairSums.logps; with_aligned: see PairSums.aligned, which is None otherwise.
    """
    head, selected = Head.of(model), scored_hidden(hidden, batch)
    scoring = Scoring(Tails(ld_alpha), with_metrics, with_aligned)
    if head.is_plain:
        if head.scale != 1.0:
            selected = selected * head.scale
        with head.weight_at_hand() as weight:
            # otherwise the Function would compute gradients that are not used
            if not torch.is_grad_enabled():
                selected, weight = selected.detach(), weight.detach()
            loss, logps, chosen, aligned, *tokens = LossInPlainHead.apply(  # pyright: ignore
                selected, weight, batch, pair_losses, scoring
            )
        sums = PairSums(logps, chosen, aligned if with_aligned else None)
        return Scored(loss, sums, TokenTerms(*tokens) if with_metrics else None)
    logps, aligned, tokens = _token_terms(
        head, selected, batch.completion_labels, with_metrics, with_aligned
    )
    of_parts = pair_sums(logps, scoring.tails.parts(batch.scored))
    sums = scoring.tails.sums(
        of_parts, None if aligned is None else pair_means(aligned, batch.scored)
    )
    return Scored(pair_losses(slice(None), sums).sum(), sums.detached(), tokens)


def scored_hidden(hidden: torch.Tensor, batch: PairBatch) -> torch.Tensor:
    """Return the hidden state before each completion token, [C, H]."""
    return hidden.flatten(0, 1).index_select(0, batch.completion_index)


# --- a head that is not plain: by autograd --------------------------------------------------------


class _TokenScores(NamedTuple):
    """Log-probs and metrics of n tokens."""

    logps: torch.Tensor  # [n] of the labels, by autograd
    aligned: torch.Tensor | None  # [n]
    terms: TokenTerms | None


def _token_terms(
    head: Head,
    selected: torch.Tensor,
    labels: torch.Tensor,
    with_metrics: bool,
    with_aligned: bool = False,
) -> _TokenScores:
    """Compute log-probs and metrics of all C tokens in chunks. selected: [C, H]."""
    rows = rows_at_once(head.vocabulary, selected.device)
    pieces = list(zip(selected.split(rows), labels.split(rows), strict=True))
    run = _terms if len(pieces) == 1 or not torch.is_grad_enabled() else _recomputed
    parts = [run(head, h, y, with_metrics, with_aligned) for h, y in pieces]
    logps = torch.cat([part.logps for part in parts])
    aligned = [part.aligned for part in parts if part.aligned is not None]
    terms = [part.terms for part in parts if part.terms is not None]
    return _TokenScores(
        logps,
        torch.cat(aligned) if aligned else None,
        TokenTerms(*map(torch.cat, zip(*terms, strict=True))) if terms else None,  # pyright: ignore
    )


def _terms(
    head: Head, hidden: torch.Tensor, labels: torch.Tensor, with_metrics: bool, with_aligned: bool
) -> _TokenScores:
    logits = head(hidden)
    normaliser = logits.logsumexp(-1)
    at_label = logits.gather(-1, labels[:, None])[:, 0]
    logps = at_label - normaliser
    aligned = tokens = None
    with torch.no_grad():
        if with_aligned:
            aligned = logps - ((2 * logits).logsumexp(-1) - 2 * normaliser)
        if with_metrics:
            entropy = normaliser - ((logits - normaliser[:, None]).exp() * logits).sum(-1)
            tokens = TokenTerms(
                entropy, logits.mean(-1), (at_label == logits.amax(-1)).to(logits.dtype)
            )
    return _TokenScores(logps, aligned, tokens)


def _recomputed(
    head: Head, hidden: torch.Tensor, labels: torch.Tensor, with_metrics: bool, with_aligned: bool
) -> _TokenScores:
    """Compute `_terms`, but free the logits and recompute them in the backward pass."""
    first: list[_TokenScores] = []

    def run(hidden: torch.Tensor) -> torch.Tensor:
        terms = _terms(head, hidden, labels, with_metrics and not first, with_aligned and not first)
        if not first:
            first.append(terms)
        return terms.logps

    logps = checkpoint(run, hidden, use_reentrant=False)
    return first[0]._replace(logps=logps)  # pyright: ignore[reportArgumentType]
