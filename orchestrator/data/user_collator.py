"""Adapt a user's collator: call it, check its output, and convert that to a PairBatch."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from orchestrator.data.collate import CollateContext, PairBatch, batch_from_masks
from orchestrator.data.pairs import PairRow
from orchestrator.settings.base import UserCodeSpec
from orchestrator.settings.errors import UserError
from orchestrator.user_code import call_user_code, user_attribute, user_code

UserCollator = Callable[..., dict[str, torch.Tensor]]


class AdaptedCollator:
    """Adapter of a user's collator: passes it rows (and `context` if it has this parameter), and
    converts its dict.
    """

    def __init__(
        self,
        collator: UserCollator | UserCodeSpec,
        pad_token_id: int,
        vocabulary: int | None = None,
    ) -> None:
        """Import and construct the collator.

        collator: an object from Python, or data.collator. pad_token_id: passed to a constructor
        with this parameter. vocabulary: the model's vocabulary size, if known.
        """
        self.vocabulary = vocabulary
        function: Any
        if isinstance(collator, UserCodeSpec):
            self.key, self.name, kwargs = "data.collator", collator.path, collator.kwargs
            function = user_attribute(self.key, self.name)
        else:
            self.key, kwargs = "data_collator", {}
            self.name = getattr(collator, "__name__", type(collator).__name__)
            function = collator
        cure = "use a function of rows, or a class, with its arguments as {path, kwargs}"
        with user_code(self.key, self.name, "when it is built"):
            try:
                if inspect.isclass(function):
                    parameters = inspect.signature(function).parameters
                    padding = {"pad_token_id": pad_token_id} if "pad_token_id" in parameters else {}
                    function = function(**padding | kwargs)
                elif kwargs:
                    function = partial(function, **kwargs)
                self.wants_context = "context" in inspect.signature(function).parameters
            except (TypeError, ValueError) as error:
                raise UserError(self.key, self.name, f"cannot be called ({error})", cure) from None
        self.collator: UserCollator = function

    def __call__(
        self, rows: list[PairRow], context: CollateContext, *, is_filler: bool = False
    ) -> PairBatch:
        """Collate B rows into a batch with the user's code; the pairs of a filler have weight 0."""
        pairs, whole = len(rows), {id(row): dict(row) for row in rows}
        arguments = {"context": context} if self.wants_context else {}
        numbers = ", ".join(str(row["pair_id"]) for row in rows)
        where = f"step {context.step}, rank {context.rank}, pairs {numbers:.60}"
        output = call_user_code(self.key, self.name, where, self.collator, rows, **arguments)
        self._check(output, pairs)
        # the collator may have sorted rows and removed keys
        rows = [whole.get(id(row), row) for row in rows]
        known = [output[key] for key in ("ref_chosen_logps", "ref_rejected_logps") if key in output]
        ref_logps = torch.cat(known).double() if len(known) == 2 else None
        masks = output["attention_mask"], output["completion_mask"]
        return batch_from_masks(rows, output["input_ids"], *masks, is_filler, ref_logps)

    def _check(self, output: Any, pairs: int) -> None:
        """Check that the collator's output has TRL's keys, shapes and types."""
        is_dict = isinstance(output, Mapping)
        shapes = {key: _shape(value) for key, value in output.items()} if is_dict else {}
        ids = output.get("input_ids") if is_dict else None
        width = ids.shape[-1:] if isinstance(ids, torch.Tensor) else ()
        expected = dict.fromkeys(
            ("input_ids", "attention_mask", "completion_mask"), (2 * pairs, *width)
        )
        expected |= {
            key: (pairs,) for key in ("ref_chosen_logps", "ref_rejected_logps") if key in shapes
        }
        if not isinstance(ids, torch.Tensor) or any(
            shapes.get(key) != shape for key, shape in expected.items()
        ):
            raise UserError(
                self.key,
                self.name,
                f"returned {shapes if is_dict else type(output).__name__} for {pairs} pairs",
                "return tensors input_ids, attention_mask and completion_mask of shape [2 * "
                "pairs, tokens], chosen half first",
            )
        if ids.is_floating_point() or (ids < 0).any():
            rule = f"returned input_ids of {ids.dtype} with minimum {ids.min().item()}"
            raise UserError(
                self.key, self.name, rule, "return integers of 0 or more, also on padding"
            )
        if self.vocabulary is not None and (largest := int(ids.max())) >= self.vocabulary:
            rule = f"returned token {largest}, but the model has {self.vocabulary} tokens"
            raise UserError(
                self.key, self.name, rule, f"return ids below {self.vocabulary}, also on padding"
            )


def _shape(value: Any) -> tuple[int, ...] | str:
    """Return the shape of a tensor, or the type name of anything else."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
