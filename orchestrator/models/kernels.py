"""Attention over packed pairs: each prompt once, without a mask tensor, by one kernel per device.

Legend: T tokens of the packed row, h query heads, g key heads, D their size.

A pair is laid out as shared | rest of the chosen | rest of the rejected sequence. Each kernel takes
query [1, h, T, D], key and value [1, g, T, D] and returns [1, T, h, D].
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from orchestrator.data.collate import PairSpan, Segments
from orchestrator.settings.model import AttentionName

CAUSAL_BLOCK = 256  # queries of a causal block in the backward pass on a CPU


class Run(NamedTuple):
    """Queries start..stop: each attends to the keys shared_start..shared_stop and to those of its
    run up to itself.
    """

    start: int
    stop: int
    shared_start: int
    shared_stop: int


def runs(spans: tuple[PairSpan, ...], scoring_only: bool) -> Iterator[Run]:
    """Yield the two runs of each pair.

    scoring_only: drop the queries before the first that scores a token.
    """
    for start, fork, rejected, stop, scored in spans:
        first = min(scored, rejected) if scoring_only else start
        yield Run(first, rejected, start, first)
        yield Run(rejected, stop, start, fork)


class _FlashOnCpu(torch.autograd.Function):
    """torch's flash kernel for CPUs, run by run: the results over shared keys and over the run's
    own keys are merged by their log-sum-exp, and the backward pass calls the kernel's backward with
    the merged result.

    Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4: the partial results of disjoint keys
    merge exactly.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        parts: list[Run],
        scale: float | None,
    ) -> torch.Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        keys, values = (_for_each_query_head(x, query.shape[1]) for x in (key, value))
        _, heads, tokens, size = query.shape
        is_whole = sum(part.stop - part.start for part in parts) == tokens
        output = (query.new_empty if is_whole else query.new_zeros)(1, tokens, heads, size)
        normalisers: list[torch.Tensor] = []
        for start, stop, shared_start, shared_stop in parts:
            if start == stop:
                continue
            queries = query[:, :, start:stop]
            result, normaliser = flash(
                queries, keys[:, :, start:stop], values[:, :, start:stop], 0.0, True, scale=scale
            )
            if shared_start < shared_stop:
                shared = slice(shared_start, shared_stop)
                other, other_normaliser = flash(
                    queries, keys[:, :, shared], values[:, :, shared], 0.0, scale=scale
                )
                both = torch.logaddexp(normaliser, other_normaliser)
                result = result * (normaliser - both).exp().unsqueeze(-1)
                factor = (other_normaliser - both).exp().unsqueeze(-1)
                result = result.addcmul_(other, factor.to(result.dtype))
                normaliser = both
            output[:, start:stop] = result.transpose(1, 2)
            normalisers.append(normaliser)
        ctx.save_for_backward(query, key, value, output, *normalisers)
        ctx.parts, ctx.scale, ctx.is_whole = parts, scale, is_whole
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        query, key, value, output, *normalisers = ctx.saved_tensors
        gradient, output = gradients[0].transpose(1, 2), output.transpose(1, 2)
        keys, values = (_for_each_query_head(x, query.shape[1]) for x in (key, value))
        new_like = torch.empty_like if ctx.is_whole else torch.zeros_like
        totals = d_query, d_keys, d_values = new_like(query), new_like(keys), new_like(values)
        remaining = iter(normalisers)
        for part in ctx.parts:
            if part.start == part.stop:
                continue
            normaliser = next(remaining)
            for own, seen, causal in _blocks(part):
                gradients_of_block = flash_backward(
                    gradient[:, :, own],
                    query[:, :, own],
                    keys[:, :, seen],
                    values[:, :, seen],
                    output[:, :, own],
                    normaliser[:, :, own.start - part.start : own.stop - part.start],
                    0.0,
                    causal,
                    scale=ctx.scale,
                )
                for total, where, part_of_it in zip(
                    totals, (own, seen, seen), gradients_of_block, strict=True
                ):
                    # every token is in one causal block, which comes before the others that touch
                    # it
                    if causal:
                        total[:, :, where] = part_of_it
                    else:
                        total[:, :, where] += part_of_it
        groups = query.shape[1] // key.shape[1]
        d_key, d_value = (
            x.unflatten(1, (key.shape[1], groups)).sum(2) if groups > 1 else x
            for x in (d_keys, d_values)
        )
        return d_query, d_key, d_value, None, None


def _blocks(run: Run) -> list[tuple[slice, slice, bool]]:
    """Return the (queries, keys, causal) blocks of a run: causal ones on the diagonal, those below
    it, the shared keys.

    The run is split because the kernel's backward pass computes the masked half of a causal block
    too, up to a width of 512 keys.
    """
    diagonal: list[tuple[slice, slice, bool]] = []
    below: list[tuple[slice, slice, bool]] = []
    waiting = [(run.start, run.stop)]
    while waiting:
        start, stop = waiting.pop()
        if stop - start <= CAUSAL_BLOCK:
            diagonal.append((slice(start, stop), slice(start, stop), True))
            continue
        middle = (start + stop) // 2
        waiting += [(start, middle), (middle, stop)]
        below.append((slice(middle, stop), slice(start, middle), False))
    shared = slice(run.shared_start, run.shared_stop)
    return (
        diagonal
        + below
        + (
            [(slice(run.start, run.stop), shared, False)]
            if run.shared_start < run.shared_stop
            else []
        )
    )


def _flash_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None,
    scoring_only: bool,
) -> torch.Tensor:
    parts = list(runs(segments.spans, scoring_only))
    return _FlashOnCpu.apply(query, key, value, parts, scale)  # pyright: ignore[reportReturnType]


class _KeysOfRuns(torch.autograd.Function):
    """Keys and values [T, g, D] laid out run by run. Shared positions occur twice, so their
    gradients are added here: autograd, which cannot know that no other position repeats, would sort
    all positions in every layer.
    """

    @staticmethod
    def forward(
        ctx: Any, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.segments = segments
        return key.index_select(0, segments.key_index), value.index_select(0, segments.key_index)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        segments: Segments = ctx.segments
        sums: list[torch.Tensor] = []
        for gradient in gradients:
            again = gradient.index_select(0, segments.shared_key)
            own = gradient.index_select(0, segments.own_key)
            sums.append(own.index_add_(0, segments.shared, again))
        return (*sums, None)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None,
    scoring_only: bool,
) -> torch.Tensor:
    """Compute all runs of all pairs in one call; window (-1, 0) is causal and aligned to the end of
    each run's keys.
    """
    from torch.nn.attention.varlen import varlen_attn

    del scoring_only  # dropping the few prompt queries would cost another gather
    # squeezed, not indexed: the derivative of query[0] would be written into zeros
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    keys, values = _KeysOfRuns.apply(key, value, segments)  # pyright: ignore
    output = varlen_attn(
        query,
        keys,
        values,
        segments.query_bounds,
        segments.key_bounds,
        *segments.longest,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, torch.Tensor)
    return output[None]


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None,
    scoring_only: bool,
) -> torch.Tensor:
    """Compute attention run by run with public functions of torch only; on a CPU torch builds a
    small mask per run.
    """
    from torch.nn.attention.bias import causal_lower_right

    keys, values = (_for_each_query_head(x, query.shape[1]) for x in (key, value))
    _, heads, tokens, size = query.shape
    output = query.new_zeros(1, heads, tokens, size)
    for start, stop, shared_start, shared_stop in runs(segments.spans, scoring_only):
        if start == stop:
            continue
        seen = [slice(shared_start, shared_stop), slice(start, stop)]
        k, v = (torch.cat([x[:, :, part] for part in seen], 2) for x in (keys, values))
        bias: Any = causal_lower_right(stop - start, k.shape[2])
        output[:, :, start:stop] = scaled_dot_product_attention(
            query[:, :, start:stop], k, v, bias, scale=scale
        )
    return output.transpose(1, 2)


def _for_each_query_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1) if heads != x.shape[1] else x


KERNELS: dict[AttentionName, Callable[..., torch.Tensor]] = {
    "cpu": _flash_on_cpu,
    "varlen": _varlen,
    "sdpa": _sdpa,
}
