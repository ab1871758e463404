"""Compute losses, sums and gradients of a plain head while its logits are in memory.

Legend: B pairs, C completion tokens, n some of them, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from orchestrator.data.collate import PairBatch
from orchestrator.models.sums import PairSums, Tails, pair_means, pair_sums

# Logits in memory at once (256 MB in fp32); a pair that needs several chunks is computed twice.
CHUNK_LOGITS = 2**26
ON_GPU = 4  # times as many on a GPU: fewer launches, and a pair's logits are seldom computed twice

PairLosses = Callable[[slice, PairSums], torch.Tensor]
"""(slice of pairs, their sums) -> [b] their contributions to the loss of the global batch."""


class Scoring(NamedTuple):
    """The weights of tokens, and what is computed of them besides their log-probs."""

    tails: Tails
    with_metrics: bool  # TokenTerms
    with_aligned: bool  # PairSums.aligned


def rows_at_once(vocabulary: int, device: torch.device) -> int:
    """Return the number of tokens whose logits may be in memory at once."""
    return max(1, CHUNK_LOGITS * (ON_GPU if device.type == "cuda" else 1) // vocabulary)


class LossInPlainHead(torch.autograd.Function):
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
        scoring: Scoring,
    ) -> tuple[torch.Tensor, ...]:
        """Return the loss [], the sums of all pairs (aligned is empty unless
        scoring.with_aligned), and entropy, mean logit and is_top1 [C] (empty unless
        scoring.with_metrics).
        """
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            work = _HeadWork(
                hidden.to(dtype),
                weight.to(dtype),
                batch.completion_labels,
                scoring,
                *ctx.needs_input_grad[:2],
            )
            losses = [torch.zeros((), dtype=torch.float64, device=hidden.device)]
            none = losses[0].new_zeros(0, 2)
            sums_of_groups = [PairSums(none, none[:, 0], none)]
            for pairs, tokens in _groups(batch.scored, rows_at_once(len(weight), weight.device)):
                loss, sums = work.group(
                    tokens, batch.scored[2 * pairs.start : 2 * pairs.stop], pairs, pair_losses
                )
                losses.append(loss)
                sums_of_groups.append(sums)
        ctx.derivatives = [(work.d_hidden, hidden.dtype), (work.d_weight, weight.dtype)]
        logps, chosen, aligned = zip(*sums_of_groups, strict=True)
        outputs = (
            torch.cat(logps),
            torch.cat(chosen),
            torch.cat(aligned if scoring.with_aligned else [none]),
            *work.metrics,
        )
        ctx.mark_non_differentiable(*outputs)
        return (torch.stack(losses).sum(), *outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of hidden and weight, computed by `forward` up to this factor."""
        factor: torch.Tensor = gradients[0]  # 1, or the loss scale of fp16
        # on a GPU .item() would synchronise
        is_one = factor.device.type == "cpu" and factor.item() == 1
        gradients_of_inputs: list[torch.Tensor | None] = []
        for derivative, dtype in ctx.derivatives:
            if derivative is not None and not is_one:
                derivative.mul_(factor.to(derivative.dtype))
            gradients_of_inputs.append(None if derivative is None else derivative.to(dtype))
        # autograd may keep these tensors as the gradients; a second backward pass fails
        del ctx.derivatives
        return (*gradients_of_inputs, None, None, None)


def _groups(scored: tuple[int, ...], rows: int) -> Iterator[tuple[slice, slice]]:
    """Yield (pairs, their tokens) of consecutive groups: as many whole pairs as fit into
    `rows` tokens, or one pair that has more.
    """
    first = begin = end = 0
    for pair in range(len(scored) // 2):
        tokens = scored[2 * pair] + scored[2 * pair + 1]
        if pair > first and end + tokens - begin > rows:
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
    """The state of LossInPlainHead.forward: hidden [C, H] and weight [V, H] in the dtype of its
    products, and outputs.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        scoring: Scoring,
        for_hidden: bool,
        for_weight: bool,
    ) -> None:
        self.hidden, self.weight, self.labels = hidden, weight, labels[:, None]
        self.tails, self.with_metrics, self.with_aligned = scoring
        self.precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        # every element will be written, if there is any token
        new_like = torch.empty_like if len(hidden) else torch.zeros_like
        self.d_hidden = new_like(hidden, dtype=self.precise) if for_hidden else None
        self.d_weight = new_like(weight, dtype=self.precise) if for_weight else None
        tokens = len(hidden) if self.with_metrics else 0
        self.metrics = hidden.new_zeros((3, tokens), dtype=self.precise)

    def group(
        self, tokens: slice, scored: tuple[int, ...], pairs: slice, pair_losses: PairLosses
    ) -> tuple[torch.Tensor, PairSums]:
        """Return the loss and the sums of a few pairs, and store their gradients."""
        rows = rows_at_once(len(self.weight), self.weight.device)
        starts = range(tokens.start, tokens.stop, rows)
        chunks = [slice(start, min(start + rows, tokens.stop)) for start in starts]
        softmax, logps, aligned = self._scores(chunks)
        parts = self.tails.parts(scored)
        of_parts = pair_sums(logps, parts)
        means = pair_means(aligned, scored) if self.with_aligned else None
        if self.d_hidden is None and self.d_weight is None:
            sums = self.tails.sums(of_parts, means)
            return pair_losses(pairs, sums).sum(), sums
        with torch.enable_grad():
            leaf = of_parts.detach().requires_grad_()
            sums = self.tails.sums(leaf, means)
            loss = pair_losses(pairs, sums).sum()
        [per_part] = torch.autograd.grad(loss, leaf)
        slopes = zip(per_part.flatten().to(self.precise).unbind(), parts, strict=True)
        # lengths on a GPU would synchronise
        coefficients = torch.cat([one.expand(length) for one, length in slopes])
        for chunk in chunks:
            if softmax is None or len(chunks) > 1:
                softmax = None
                softmax = self._softmax(chunk, is_first=False)
            own = slice(chunk.start - tokens.start, chunk.stop - tokens.start)
            self._gradients(chunk, softmax, coefficients[own, None])
        return loss.detach(), sums.detached()

    def _scores(self, chunks: list[slice]) -> tuple[_Softmax | None, torch.Tensor, torch.Tensor]:
        """Return the softmax of the last chunk, and of all chunks the log-probs [n] and `aligned`
        [n] (empty unless with_aligned).
        """
        softmax = None
        logps: list[torch.Tensor] = [self.hidden.new_zeros(0, 1, dtype=self.precise)]
        aligned = logps.copy()
        for chunk in chunks:
            softmax = None  # frees the logits of the previous chunk before the next are computed
            softmax = self._softmax(chunk, is_first=True)
            logps.append(softmax.logps)
            if self.with_aligned:
                aligned.append(softmax.aligned)
        return softmax, torch.cat(logps)[:, 0], torch.cat(aligned)[:, 0]

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
                # of z under p
                mean = torch.linalg.vecdot(product, hidden)[:, None] / total + at_label
                self.metrics[0, chunk] = (top + total.log() - mean)[:, 0]
        if self.d_weight is None:
            return
        has_some = chunk.start > 0  # d_weight holds the sum over earlier chunks
        if exactly:
            self.d_weight.addmm_(exps.t(), hidden * factors, beta=float(has_some))
        else:
            largest = factors.abs().amax().clamp_min(1e-30)  # fp16 would lose small coefficients
            product = (exps.t() @ (hidden * (factors / largest)).to(exps.dtype)).to(self.precise)
            if has_some:
                self.d_weight.addcmul_(product, largest)
            else:
                torch.mul(product, largest, out=self.d_weight)
