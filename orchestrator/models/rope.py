"""Compute length-dependent rotary frequencies from the length of each row of a batch.

transformers uses the longest row of a batch for all of them, so that the log-probs of a sequence
would depend on the rest of its batch. Here they are those of the sequence in a batch of one.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from orchestrator.models.layers import body_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BY_LENGTH = ("dynamic", "longrope")


def _parameters(config: Any) -> list[dict[str, Any]]:
    """Return the rope parameters of a config: one set, or one for each type of layer."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [
        each for each in (rope, *rope.values()) if isinstance(each, dict) and "rope_type" in each
    ]


def fixed_up_to(config: Any) -> int | None:
    """Return the length up to which the frequencies are the same for all sequences; None if they
    never differ.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    lengths = [
        rope.get("original_max_position_embeddings") or limit
        if rope["rope_type"] == "longrope"
        else limit
        for rope in _parameters(config)
        if rope["rope_type"] in BY_LENGTH
    ]
    return min((length for length in lengths if length is not None), default=None)


def most_positions(config: Any) -> int | None:
    """Return the longest sequence that a model supports; None without a limit, as with dynamic
    frequencies.

    max_position_embeddings is the number of positions before scaling in some checkpoints, after
    scaling in others.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    scaled = _parameters(config)
    if (window := getattr(config.get_text_config(), "keep_window_size", None)) is not None:
        return window  # beyond it Doge selects keys by all tokens, including later ones
    if limit is None or limit < 1 or any(rope["rope_type"] == "dynamic" for rope in scaled):
        return None
    before = [
        (rope.get("factor"), rope.get("original_max_position_embeddings") or limit)
        for rope in scaled
    ]
    return max([limit, *(int(factor * length) for factor, length in before if factor)])


def use_own_lengths(model: "PreTrainedModel") -> None:
    """Use the frequencies of its own length for each row of a padded batch."""
    if any(
        isinstance(getattr(module, "rows_by_length", None), _Rows) for module in model.modules()
    ):
        return
    rows = _Rows()
    body_of(model).register_forward_pre_hook(rows.note_lengths, with_kwargs=True)
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(kind in BY_LENGTH for kind in kinds):
            module.rows_by_length = rows  # pyright: ignore[reportArgumentType]
            module.register_forward_pre_hook(rows.forget_longest)
            module.register_forward_hook(rows.by_row, with_kwargs=True)


class _Rows:
    """Hooks of one model. Bound methods, so that a copy of the model has a copy of them."""

    def __init__(self) -> None:
        self.lengths: torch.Tensor | None = None  # [R] of the current batch

    def note_lengths(self, _: nn.Module, __: Any, options: dict[str, Any]) -> None:
        """Keep the lengths of the rows until the next batch: recomputed layers need them again."""
        mask = options.get("attention_mask")
        self.lengths = None
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
            self.lengths = ((mask != 0) * positions).amax(1).clamp(min=1)

    def forget_longest(self, rotary: nn.Module, _: Any) -> None:
        """Reset the cached maximum: dynamic frequencies would otherwise stay those of the longest
        input so far.
        """
        for name in vars(rotary):
            if name.endswith("max_seq_len_cached"):
                setattr(rotary, name, 0)

    def by_row(
        self, rotary: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any
    ) -> Any:
        """Call the module once for each length, and combine the results by row."""
        lengths = self.lengths
        if lengths is None or (lengths == lengths[0]).all():
            return None
        whole = output
        for length in lengths.unique().tolist():
            self.forget_longest(rotary, args)
            embeddings = rotary.forward(
                *_clamped(args, length - 1), **_clamped_keywords(options, length - 1)
            )
            whole = _where(lengths == length, embeddings, whole)
        return whole


def _clamped(args: tuple[Any, ...], last: int) -> tuple[Any, ...]:
    """Clamp positions to a row's last one; those beyond it are padding."""
    return tuple(x.clamp(max=last) if _are_positions(x) else x for x in args)


def _clamped_keywords(options: dict[str, Any], last: int) -> dict[str, Any]:
    return dict(zip(options, _clamped(tuple(options.values()), last), strict=True))


def _are_positions(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and not x.is_floating_point()


def _where(rows: torch.Tensor, inside: Any, outside: Any) -> Any:
    """Select `inside` in these rows [R], `outside` elsewhere; tensors [R or 1, T, ...], or tuples
    of them.
    """
    if isinstance(inside, tuple | list):
        return type(inside)(_where(rows, *both) for both in zip(inside, outside, strict=True))
    return torch.where(rows.view(-1, *[1] * (inside.ndim - 1)), inside, outside)
