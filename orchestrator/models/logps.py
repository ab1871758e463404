"""Compute the log-prob of each sequence from hidden states: chunked head, fp64 sums, the loss
computed in the head.

Legend: B pairs, 2B sequences, R rows of the batch, T tokens of a row, H hidden size, C completion
tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from orchestrator.data.collate import PackedCollator, PairBatch, PreferenceCollator
from orchestrator.models.attention import packed_arguments
from orchestrator.models.layers import body_of
from orchestrator.settings.spec import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_LOGITS = (
    2**26
)  # logits in memory at once (256 MB in fp32); a pair that needs several chunks is computed twice
ON_GPU = 4  # times as many on a GPU: fewer launches, and a pair's logits are seldom computed twice


# Config keys of a factor or a cap of the logits, in Cohere, Falcon-H1; Granite, Inkling; Gemma,
# xLSTM.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class PairSums(NamedTuple):
    """Per-pair sums over tokens that a loss is computed from, for b pairs, in fp64, the chosen
    first.
    """

    logps: (
        torch.Tensor
    )  # [b, 2] summed over completion tokens; those beyond the shorter one have weight dpo.ld_alpha
    chosen: torch.Tensor  # [b] of the chosen, every token with weight 1
    aligned: (
        torch.Tensor | None
    )  # [b, 2] mean over tokens of log p(label) - log(sum of p^2), without gradient


PairLosses = Callable[[slice, PairSums], torch.Tensor]
"""(slice of pairs, their sums) -> [b] their contributions to the loss of the global batch."""


class TokenTerms(NamedTuple):
    """Metrics of each completion token from its logits, all [C] and without gradient."""

    entropy: torch.Tensor  # nats
    mean_logit: torch.Tensor  # over the vocabulary
    is_top1: torch.Tensor  # 1.0 where no token is more probable than the label


def body_hidden(model: "PreTrainedModel", batch: PairBatch) -> torch.Tensor:
    """Return the last hidden states [R, T, H], computed without the head."""
    return body_of(model)(
        input_ids=batch.input_ids, use_cache=False, **layout_of(batch)
    ).last_hidden_state


def layout_of(batch: PairBatch) -> dict[str, Any]:
    """Return the keyword arguments of a model's body that define which tokens of the batch attend
    to which.
    """
    if batch.segments is None:
        return {"attention_mask": batch.attention_mask}
    return packed_arguments(batch.segments, batch.input_ids) | {"position_ids": batch.position_ids}


def sequence_sums(values: torch.Tensor, batch: PairBatch) -> torch.Tensor:
    """Sum each completion: [..., C] -> [..., 2B], all chosen first.

    In fp64: a serial fp32 sum over a completion causes an error of 1e-4 in the loss.
    """
    return _pair_sums(values, batch.scored).transpose(-1, -2).flatten(-2)


def _pair_sums(values: torch.Tensor, scored: tuple[int, ...]) -> torch.Tensor:
    """Sum each completion in fp64: [..., C] -> [..., B, 2].

    The order is fixed on every device, unlike index_add's.
    """
    parts = [part.sum(-1, dtype=torch.float64) for part in values.split(list(scored), dim=-1)]
    return torch.stack(parts, dim=-1).unflatten(-1, (-1, 2))


class _Tails(NamedTuple):
    """The weight of a pair's tokens beyond its shorter completion. LD-DPO: Liu et al. 2024, arXiv
    2409.06411, eq. 10: with n tokens in the shorter one, log p(y) is sum(log p of the first n) +
    ld_alpha * sum(log p of the rest).
    """

    ld_alpha: float | None  # None: they have weight 1, and a sequence is summed in one part

    def parts(self, scored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the number of tokens of each part, from that of each sequence."""
        if self.ld_alpha is None:
            return scored
        both = [
            (min(pair), tokens)
            for pair in zip(scored[::2], scored[1::2], strict=True)
            for tokens in pair
        ]
        return tuple(part for shared, tokens in both for part in (shared, tokens - shared))

    def sums(self, of_parts: torch.Tensor, aligned: torch.Tensor | None) -> PairSums:
        """Combine the sums over parts.

        of_parts: from `_pair_sums`, [b, 2], or [2b, 2] with ld_alpha.
        """
        if self.ld_alpha is None:
            return PairSums(of_parts, of_parts[:, 0], aligned)
        shared, rest = of_parts.unflatten(0, (-1, 2)).unbind(-1)
        return PairSums(shared + self.ld_alpha * rest, shared[:, 0] + rest[:, 0], aligned)


def _pair_means(values: torch.Tensor, scored: tuple[int, ...]) -> torch.Tensor:
    """Average each completion in fp64: [C] -> [B, 2]; 0 for a completion without tokens."""
    tokens = torch.tensor(scored, dtype=torch.float64).clamp(min=1).view(-1, 2)
    return _pair_sums(values, scored) / tokens.to(values.device, non_blocking=True)


@torch.no_grad()
def packed_error(model: "PreTrainedModel", device: torch.device) -> float:
    """Return how far packed hidden states are from padded ones on one small pair, relative to the
    largest of them.

    If packing is exact, this is rounding. It is large with a release of transformers that drops our
    layout keyword, and infinite if the model cannot run without it.
    """
    training = model.training
    model.eval()  # dropout would differ between the two passes
    packed, padded = small_batches(device)
    expected = _selected(body_hidden(model, padded), padded)
    try:
        found = _selected(body_hidden(model, packed), packed)
    except (RuntimeError, TypeError, ValueError):
        return math.inf
    finally:
        model.train(training)
    return ((found - expected).abs().amax() / expected.abs().amax()).item()


def small_batches(device: torch.device) -> tuple[PairBatch, PairBatch]:
    """Return one pair of a few tokens as a packed and a padded batch, to probe a model."""
    row = {
        "pair_id": 0,
        "prompt_ids": [3, 1, 2, 0],
        "chosen_ids": [1, 4, 2],
        "rejected_ids": [5, 3, 4, 1],
    }
    data = DataSpec(train="")  # pyright: ignore[reportCallIssue]
    return PackedCollator(data)([row]).to(device), PreferenceCollator(0, data)([row]).to(device)


# --- the head of a model --------------------------------------------------------------------------


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
        plain = (
            type(self.module) is torch.nn.Linear and self.module.bias is None and self.cap is None
        )
        return plain and type(self.module.weight) is torch.nn.Parameter  # pyright: ignore[reportUnknownMemberType]

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

    At most CHUNK_LOGITS logits (on a GPU ON_GPU times as many) are in memory at a time, in forward
    and backward.

    ld_alpha: see PairSums.logps; with_aligned: see PairSums.aligned, which is None otherwise.
    """
    head, selected = Head.of(model), _selected(hidden, batch)
    tails = _Tails(ld_alpha)
    if head.is_plain:
        if head.scale != 1.0:
            selected = selected * head.scale
        with head.weight_at_hand() as weight:
            if (
                not torch.is_grad_enabled()
            ):  # otherwise the Function would compute gradients that are not used
                selected, weight = selected.detach(), weight.detach()
            loss, logps, chosen, aligned, *tokens = _LossInHead.apply(  # pyright: ignore
                selected, weight, batch, pair_losses, tails, with_metrics, with_aligned
            )
        sums = PairSums(logps, chosen, aligned if with_aligned else None)
        return Scored(loss, sums, TokenTerms(*tokens) if with_metrics else None)
    logps, aligned, tokens = _token_terms(
        head, selected, batch.completion_labels, with_metrics, with_aligned
    )
    of_parts = _pair_sums(logps, tails.parts(batch.scored))
    sums = tails.sums(of_parts, None if aligned is None else _pair_means(aligned, batch.scored))
    return Scored(pair_losses(slice(None), sums).sum(), _detached(sums), tokens)


def _detached(sums: PairSums) -> PairSums:
    return sums._replace(logps=sums.logps.detach(), chosen=sums.chosen.detach())


@torch.no_grad()
def sequence_logps(
    model: "PreTrainedModel",
    batch: PairBatch,
    hidden: torch.Tensor | None = None,
    ld_alpha: float | None = None,
) -> torch.Tensor:
    """Return the log-probs [2B] of a whole model in fp64, without gradient; bitwise equal to those
    in its loss.

    hidden: [R, T, H] its last hidden states, if they are known. ld_alpha: see PairSums.logps.
    """

    def no_loss(_: slice, sums: PairSums) -> torch.Tensor:
        return sums.logps.new_zeros(len(sums.logps))

    hidden = body_hidden(model, batch) if hidden is None else hidden
    return loss_in_head(model, hidden, batch, no_loss, with_metrics=False, ld_alpha=ld_alpha).logps


def _selected(hidden: torch.Tensor, batch: PairBatch) -> torch.Tensor:
    """Return the hidden state before each completion token, [C, H]."""
    return hidden.flatten(0, 1).index_select(0, batch.completion_index)


def _rows_at_once(vocabulary: int, device: torch.device) -> int:
    return max(1, CHUNK_LOGITS * (ON_GPU if device.type == "cuda" else 1) // vocabulary)


# --- loss in head ---------------------------------------------------------------------------------


class _LossInHead(torch.autograd.Function):
    """The loss and, while its logits are in memory, its gradients by the hidden states and by the
    head's weight.

    The reference is known, and a pair's loss depends on that pair only. So the forward pass
    computes the logits z of a few pairs, from their log-probs the losses, and from those the
    coefficient c = dloss/dlogp of every token. The softmax p overwrites z, and with e the one-hot
    labels

        dloss/dhidden = c (e - p) W        dloss/dW = (c (e - p))' hidden

    These are three matrix products; recomputing the logits in the backward pass would need four.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        batch: PairBatch,
        pair_losses: PairLosses,
        tails: _Tails,
        with_metrics: bool,
        with_aligned: bool,
    ) -> tuple[torch.Tensor, ...]:
        """Return the loss [], the sums of all pairs (aligned is empty unless with_aligned), and
        entropy, mean logit and is_top1 [C] (empty unless with_metrics).
        """
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            needed = ctx.needs_input_grad[:2]
            work = _HeadWork(
                hidden.to(dtype),
                weight.to(dtype),
                batch.completion_labels,
                tails,
                with_metrics,
                with_aligned,
                *needed,
            )
            losses = [torch.zeros((), dtype=torch.float64, device=hidden.device)]
            none = losses[0].new_zeros(0, 2)
            found = [PairSums(none, none[:, 0], none)]
            for pairs, tokens in _groups(batch.scored, _rows_at_once(len(weight), weight.device)):
                loss, sums = work.group(
                    tokens, batch.scored[2 * pairs.start : 2 * pairs.stop], pairs, pair_losses
                )
                losses.append(loss)
                found.append(sums)
        ctx.found = [(work.d_hidden, hidden.dtype), (work.d_weight, weight.dtype)]
        logps, chosen, aligned = zip(*found, strict=True)
        outputs = (
            torch.cat(logps),
            torch.cat(chosen),
            torch.cat(aligned if with_aligned else [none]),
            *work.metrics,
        )
        ctx.mark_non_differentiable(*outputs)
        return (torch.stack(losses).sum(), *outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        factor: torch.Tensor = gradients[0]  # 1, or the loss scale of fp16
        is_one = (
            factor.device.type == "cpu" and factor.item() == 1
        )  # on a GPU .item() would synchronise
        given: list[torch.Tensor | None] = []
        for made, dtype in ctx.found:
            if made is not None and not is_one:
                made.mul_(factor.to(made.dtype))
            given.append(None if made is None else made.to(dtype))
        del (
            ctx.found
        )  # autograd may keep these tensors as the gradients; a second backward pass fails
        return (*given, None, None, None, None, None)


def _groups(scored: tuple[int, ...], rows_at_once: int) -> Iterator[tuple[slice, slice]]:
    """Yield (pairs, their tokens) of consecutive groups: as many whole pairs as fit into
    rows_at_once tokens, or one pair that has more.
    """
    first = begin = end = 0
    for pair in range(len(scored) // 2):
        tokens = scored[2 * pair] + scored[2 * pair + 1]
        if pair > first and end + tokens - begin > rows_at_once:
            yield slice(first, pair), slice(begin, end)
            first, begin = pair, end
        end += tokens
    yield slice(first, len(scored) // 2), slice(begin, end)


class _Softmax(NamedTuple):
    """The softmax of logits z, as exps / total."""

    exps: torch.Tensor  # [n, V] exp(z - top), in the memory of the logits
    total: torch.Tensor  # [n, 1]
    top: torch.Tensor  # [n, 1] the largest logit
    at_label: torch.Tensor  # [n, 1] the label's logit

    @property
    def logps(self) -> torch.Tensor:
        """Return the log-probs of the labels, [n, 1]."""
        return self.at_label - self.top - self.total.log()

    @property
    def aligned(self) -> torch.Tensor:
        """Return log p(label) - log(sum of p^2), [n, 1]."""
        log_root = (
            torch.linalg.vector_norm(self.exps, dim=-1, keepdim=True).log() - self.total.log()
        )
        return self.logps - 2 * log_root


class _HeadWork:
    """The state of _LossInHead.forward: hidden [C, H] and weight [V, H] in the dtype of its
    products, and outputs.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        tails: _Tails,
        with_metrics: bool,
        with_aligned: bool,
        for_hidden: bool,
        for_weight: bool,
    ) -> None:
        self.hidden, self.weight, self.labels, self.tails = hidden, weight, labels[:, None], tails
        self.with_metrics, self.with_aligned = with_metrics, with_aligned
        self.precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        made_like = (
            torch.empty_like if len(hidden) else torch.zeros_like
        )  # every element will be written
        self.d_hidden = made_like(hidden, dtype=self.precise) if for_hidden else None
        self.d_weight = made_like(weight, dtype=self.precise) if for_weight else None
        self.metrics = hidden.new_zeros((3, len(hidden) if with_metrics else 0), dtype=self.precise)

    def group(
        self, tokens: slice, scored: tuple[int, ...], pairs: slice, pair_losses: PairLosses
    ) -> tuple[torch.Tensor, PairSums]:
        """Return the loss and the sums of a few pairs, and store their gradients."""
        rows = _rows_at_once(len(self.weight), self.weight.device)
        chunks = [
            slice(start, min(start + rows, tokens.stop))
            for start in range(tokens.start, tokens.stop, rows)
        ]
        softmax = None
        logps: list[torch.Tensor] = [self.hidden.new_zeros(0, 1, dtype=self.precise)]
        aligned = logps.copy()
        for chunk in chunks:
            softmax = None  # frees the logits of the previous chunk before the next are computed
            softmax = self._softmax(chunk, is_first=True)
            logps.append(softmax.logps)
            if self.with_aligned:
                aligned.append(softmax.aligned)
        parts = self.tails.parts(scored)
        of_parts = _pair_sums(torch.cat(logps)[:, 0], parts)
        means = _pair_means(torch.cat(aligned)[:, 0], scored) if self.with_aligned else None
        if self.d_hidden is None and self.d_weight is None:
            sums = self.tails.sums(of_parts, means)
            return pair_losses(pairs, sums).sum(), sums
        with torch.enable_grad():
            leaf = of_parts.detach().requires_grad_()
            sums = self.tails.sums(leaf, means)
            loss = pair_losses(pairs, sums).sum()
        [per_part] = torch.autograd.grad(loss, leaf)
        slopes = zip(per_part.flatten().to(self.precise).unbind(), parts, strict=True)
        coefficients = torch.cat(
            [one.expand(length) for one, length in slopes]
        )  # GPU lengths would synchronise
        for chunk in chunks:
            if softmax is None or len(chunks) > 1:
                softmax = None
                softmax = self._softmax(chunk, is_first=False)
            self._gradients(
                chunk,
                softmax,
                coefficients[chunk.start - tokens.start : chunk.stop - tokens.start, None],
            )
        return loss.detach(), _detached(sums)

    def _softmax(self, chunk: slice, is_first: bool) -> _Softmax:
        logits = (self.hidden[chunk] @ self.weight.t()).to(self.precise)
        top = logits.amax(-1, keepdim=True)
        at_label = logits.gather(1, self.labels[chunk])
        if self.with_metrics and is_first:
            self.metrics[1, chunk] = logits.mean(-1)
            self.metrics[2, chunk] = (at_label == top)[:, 0].to(self.precise)
        exps = logits.sub_(top).exp_()
        total = exps.sum(-1, keepdim=True)
        if self.with_metrics and is_first and not self._entropy_by_product:
            self.metrics[0, chunk] = (
                total.log() - torch.special.xlogy(exps, exps).sum(-1, keepdim=True) / total
            )[:, 0]
        return _Softmax(exps, total, top, at_label)

    @property
    def _entropy_by_product(self) -> bool:
        """Return whether the entropy comes from exps W, which the gradient needs anyway: it gives
        the sum of exps * z, exactly enough unless it is in 16 bits.
        """
        return self.d_hidden is not None and self.weight.dtype == self.precise

    def _gradients(self, chunk: slice, softmax: _Softmax, coefficients: torch.Tensor) -> None:
        """Store the gradients of a chunk. coefficients: [n, 1] dloss/dlogp."""
        exps, total, top, at_label = softmax
        hidden = self.hidden[chunk]
        exps.scatter_add_(1, self.labels[chunk], -total)  # total * (p - e)
        if exactly := exps.dtype == self.weight.dtype:
            factors = -coefficients / total
        else:
            exps = torch.div(exps, total, out=torch.empty_like(exps, dtype=self.weight.dtype))
            factors = -coefficients
        if self.d_hidden is not None:
            product = exps @ self.weight
            self.d_hidden[chunk] = product * factors
            if self.with_metrics and self._entropy_by_product:
                mean = (
                    torch.linalg.vecdot(product, hidden)[:, None] / total + at_label
                )  # of z under p
                self.metrics[0, chunk] = (top + total.log() - mean)[:, 0]
        if self.d_weight is None:
            return
        has_some = chunk.start > 0  # d_weight holds the sum over earlier chunks
        if exactly:
            self.d_weight.addmm_(exps.t(), hidden * factors, beta=float(has_some))
        else:
            largest = factors.abs().amax().clamp_min(1e-30)  # fp16 would lose small coefficients
            made = (exps.t() @ (hidden * (factors / largest)).to(exps.dtype)).to(self.precise)
            if has_some:
                self.d_weight.addcmul_(made, largest)
            else:
                torch.mul(made, largest, out=self.d_weight)


# --- any head, any loss ---------------------------------------------------------------------------


class _OfTokens(NamedTuple):
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
) -> _OfTokens:
    """Compute log-probs and metrics of all C tokens in chunks. selected: [C, H]."""
    rows = _rows_at_once(head.vocabulary, selected.device)
    pieces = list(zip(selected.split(rows), labels.split(rows), strict=True))
    run = _terms if len(pieces) == 1 or not torch.is_grad_enabled() else _recomputed
    parts = [run(head, h, y, with_metrics, with_aligned) for h, y in pieces]
    logps = torch.cat([part.logps for part in parts])
    aligned = [part.aligned for part in parts if part.aligned is not None]
    terms = [part.terms for part in parts if part.terms is not None]
    return _OfTokens(
        logps,
        torch.cat(aligned) if aligned else None,
        TokenTerms(*map(torch.cat, zip(*terms, strict=True))) if terms else None,  # pyright: ignore
    )


def _terms(
    head: Head, hidden: torch.Tensor, labels: torch.Tensor, with_metrics: bool, with_aligned: bool
) -> _OfTokens:
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
    return _OfTokens(logps, aligned, tokens)


def _recomputed(
    head: Head, hidden: torch.Tensor, labels: torch.Tensor, with_metrics: bool, with_aligned: bool
) -> _OfTokens:
    """Compute `_terms`, but free the logits and recompute them in the backward pass."""
    first: list[_OfTokens] = []

    def run(hidden: torch.Tensor) -> torch.Tensor:
        made = _terms(head, hidden, labels, with_metrics and not first, with_aligned and not first)
        if not first:
            first.append(made)
        return made.logps

    logps = checkpoint(run, hidden, use_reentrant=False)
    return first[0]._replace(logps=logps)  # pyright: ignore[reportArgumentType]
