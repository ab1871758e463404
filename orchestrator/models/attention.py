"""Attention over packed pairs through transformers' attention interface: each prompt once, without
a mask tensor.

Legend: T tokens of the packed row, h query heads, g key heads, D their size, N positions that score
a token.

A pair is laid out as shared | rest of the chosen | rest of the rejected sequence. The layout is
passed as a forward keyword to every attention layer, so that gradient checkpointing, which calls a
layer again in another thread, passes the same layout again.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from orchestrator.data.collate import PairSpan, Segments
from orchestrator.models.layers import decoder_layers
from orchestrator.models.rope import fixed_up_to
from orchestrator.settings.errors import UserError
from orchestrator.settings.model import AttentionName
from orchestrator.settings.precision import PRECISION_TRAITS, Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYOUT = "pair_segments"
"""The forward keyword that passes Segments."""

# Architectures for which tests/models/test_attention.py compares packed with padded log-probs.
CHECKED = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2")

CAUSAL_BLOCK = 256  # queries of a causal block in the backward pass on a CPU

# In the last layer, the hidden state of a token that scores nothing (most of the prompt) is not
# used: only its key and value are. These modules of that layer, by architecture, process each token
# on its own and skip such tokens.
ATTENTION = {**dict.fromkeys(CHECKED, "self_attn"), "gpt2": "attn"}
SKIPPING = {
    **dict.fromkeys(CHECKED, ("self_attn.q_proj", "self_attn.o_proj", "mlp")),
    "gpt2": ("attn.c_proj", "mlp"),  # its query, key and value are one projection
}


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


# --- the kernels ----------------------------------------------------------------------------------
# Each takes query [1, h, T, D], key and value [1, g, T, D] and returns [1, T, h, D].


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
        all_asked = sum(part.stop - part.start for part in parts) == tokens
        output = (query.new_empty if all_asked else query.new_zeros)(1, tokens, heads, size)
        normalisers: list[torch.Tensor] = []
        for start, stop, shared_start, shared_stop in parts:
            if start == stop:
                continue
            queries = query[:, :, start:stop]
            made, normaliser = flash(
                queries, keys[:, :, start:stop], values[:, :, start:stop], 0.0, True, scale=scale
            )
            if shared_start < shared_stop:
                shared = slice(shared_start, shared_stop)
                other, other_normaliser = flash(
                    queries, keys[:, :, shared], values[:, :, shared], 0.0, scale=scale
                )
                both = torch.logaddexp(normaliser, other_normaliser)
                made = made * (normaliser - both).exp().unsqueeze(-1)
                made = made.addcmul_(
                    other, (other_normaliser - both).exp().unsqueeze(-1).to(made.dtype)
                )
                normaliser = both
            output[:, start:stop] = made.transpose(1, 2)
            normalisers.append(normaliser)
        ctx.save_for_backward(query, key, value, output, *normalisers)
        ctx.parts, ctx.scale, ctx.all_asked = parts, scale, all_asked
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        query, key, value, output, *normalisers = ctx.saved_tensors
        gradient, output = gradients[0].transpose(1, 2), output.transpose(1, 2)
        keys, values = (_for_each_query_head(x, query.shape[1]) for x in (key, value))
        made = torch.empty_like if ctx.all_asked else torch.zeros_like
        totals = d_query, d_keys, d_values = made(query), made(keys), made(values)
        remaining = iter(normalisers)
        for part in ctx.parts:
            if part.start == part.stop:
                continue
            normaliser = next(remaining)
            for own, seen, causal in _blocks(part):
                found = flash_backward(
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
                for total, where, part_of_it in zip(totals, (own, seen, seen), found, strict=True):
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
        found: list[torch.Tensor] = []
        for gradient in gradients:
            again = gradient.index_select(0, segments.shared_key)
            found.append(
                gradient.index_select(0, segments.own_key).index_add_(0, segments.shared, again)
            )
        return (*found, None)


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
    made = varlen_attn(
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
    assert isinstance(made, torch.Tensor)
    return made[None]


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
        bias = causal_lower_right(stop - start, k.shape[2])
        output[:, :, start:stop] = scaled_dot_product_attention(
            query[:, :, start:stop], k, v, bias, scale=scale
        )  # pyright: ignore[reportArgumentType]
    return output.transpose(1, 2)


def _for_each_query_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1) if heads != x.shape[1] else x


KERNELS: dict[AttentionName, Callable[..., torch.Tensor]] = {
    "cpu": _flash_on_cpu,
    "varlen": _varlen,
    "sdpa": _sdpa,
}


# --- behind transformers' interface ---------------------------------------------------------------


def choose_kernel(
    asked: AttentionName, device: torch.device, precision: Precision
) -> AttentionName:
    """Return the kernel for packed rows.

    Raises:
        UserError: the kernel in the settings does not run on this device with this precision.
    """
    flash_types = PRECISION_TRAITS[precision].is_16_bit
    best: AttentionName = "cpu" if device.type == "cpu" else "sdpa"
    if device.type == "cuda" and flash_types and torch.cuda.get_device_capability(device)[0] >= 8:
        best = "varlen"
    if asked == "auto":
        return best
    if asked in ("cpu", "varlen") and asked != best:
        needs = "a CPU" if asked == "cpu" else "a GPU from Ampere on and precision bf16 or fp16"
        raise UserError("model.attention", asked, f"needs {needs}", f"use {best} or auto")
    return asked


def not_exact(config: Any, longest: int) -> str | None:
    """Return why packed rows would change this model's log-probs; None if they do not."""
    text = config.get_text_config()
    window = (
        getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    )
    if text.model_type not in CHECKED:
        return (
            f"{text.model_type} is not among the architectures checked for it "
            f"({', '.join(CHECKED)})"
        )
    if window is not None and longest > window:
        return f"its sliding window has {window} tokens and the longest sequence {longest}"
    if (fixed := fixed_up_to(config)) is not None and longest > fixed:
        return (
            f"its rotary embedding depends on a sequence's length beyond {fixed} tokens, and a "
            "pair has two lengths"
        )
    if getattr(text, "use_bidirectional_attention", None):
        return "its attention is bidirectional"
    if any(
        value for name, value in vars(text).items() if name in ("attention_dropout", "attn_pdrop")
    ):
        return "it has dropout in its attention (model.disable_dropout=true removes it)"
    return None


def use_packed_attention(model: "PreTrainedModel", kernel: AttentionName) -> None:
    """Use packed attention for batches with segments; any other forward pass (generate) keeps
    torch's SDPA.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        segments = options.pop(LAYOUT, None)
        if segments is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, **options
            )
        if torch.is_autocast_enabled(
            query.device.type
        ):  # rotary embeddings return query and key in fp32
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        return KERNELS[kernel](
            query, key, value, segments, scaling, hasattr(module, "skips_unscored")
        ), None

    name = f"packed_pairs_{kernel}"  # with "flash" in it transformers would look for that package
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
    _skip_unscored(model)


def packed_arguments(segments: Segments, input_ids: torch.Tensor) -> dict[str, Any]:
    """Return the keyword arguments of a model's forward for a packed row. transformers uses a mask
    of four dimensions as it is, and so builds none.
    """
    return {LAYOUT: segments, "attention_mask": input_ids.new_empty(1, 1, 0, 0)}


def _skip_unscored(model: "PreTrainedModel") -> None:
    """Make the last layer skip tokens whose hidden state is not used."""
    layers = decoder_layers(model)
    kind = model.config.get_text_config().model_type
    attention = layers[-1].get_submodule(ATTENTION[kind])
    if hasattr(attention, "skips_unscored"):
        return  # a second kernel for the same model: two sets of hooks would skip twice
    skipping = _Skipping()
    attention.skips_unscored = True  # pyright: ignore[reportArgumentType]
    attention.register_forward_pre_hook(skipping.begin, with_kwargs=True)
    for name in SKIPPING[kind]:
        layers[-1].get_submodule(name).register_forward_pre_hook(skipping.pick)
        layers[-1].get_submodule(name).register_forward_hook(skipping.put_back)


class _Skipping:
    """Hooks of one layer. Its attention runs first and receives the layout as a keyword, also when
    recomputed.
    """

    def __init__(self) -> None:
        self.scoring: torch.Tensor | None = None  # [N] of the current forward pass
        self.tokens = 0

    def begin(self, _: nn.Module, __: Any, options: dict[str, Any]) -> None:
        segments = options.get(LAYOUT)
        self.scoring = None if segments is None else segments.scoring

    def pick(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Select the scoring tokens: [1, T, features] -> [1, N, features]."""
        if self.scoring is None:
            return inputs
        self.tokens = inputs[0].shape[1]
        return (inputs[0].index_select(1, self.scoring),)

    def put_back(self, _: nn.Module, __: Any, made: torch.Tensor) -> torch.Tensor:
        """Scatter the output back: [1, N, features] -> [1, T, features], with zeros, finite and
        unused, elsewhere.
        """
        if self.scoring is None:
            return made
        return made.new_zeros(1, self.tokens, made.shape[-1]).index_copy(1, self.scoring, made)
