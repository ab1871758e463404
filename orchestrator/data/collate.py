"""Rows of token ids -> one PairBatch, by our collator or by a user's.

Legend: B pairs, 2B sequences (all chosen, then all rejected), T tokens of the longest, C completion tokens.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch

from orchestrator.settings.spec import DataSpec, UserError

Row = dict[str, Any]
UserCollator = Callable[..., dict[str, torch.Tensor]]


class Counts(NamedTuple):
    """What the sums of a step are divided by: counts of the GLOBAL batch, the same on every rank."""

    pairs: int
    tokens: int  # of both sequences of every pair, padding left out


class PairBatch(NamedTuple):
    """One micro-batch. Everything that indexes tokens is made on the host: finding it on a GPU would stall it."""

    pair_ids: torch.Tensor  # [B] row numbers of the source
    pair_weights: torch.Tensor  # [B] 1, or 0 in a filler
    input_ids: torch.Tensor  # [2B, T]
    attention_mask: torch.Tensor  # [2B, T] 0 on padding
    completion_index: torch.Tensor  # [C] into the flat [2B * T] hidden states: the position BEFORE each token
    completion_labels: torch.Tensor  # [C] the token to predict there
    completion_sequence: torch.Tensor  # [C] which of the 2B sequences it belongs to
    ref_logps: torch.Tensor | None  # [2B] the reference's log-probs where they are known already

    def to(self, device: torch.device) -> "PairBatch":
        """The same batch on another device; copies from pinned memory do not block."""
        return PairBatch(*(None if t is None else t.to(device, non_blocking=True) for t in self))  # pyright: ignore

    @property
    def counts(self) -> Counts:
        """Pairs and tokens of this micro-batch alone, fillers left out; on the host."""
        return Counts(
            int(self.pair_weights.sum()), int((self.attention_mask.sum(1) * self.pair_weights.repeat(2)).sum())
        )


@dataclass(frozen=True)
class CollateContext:
    """What a distribution-aware collator may know about the batch it is asked to make."""

    rank: int
    world_size: int
    step: int  # the step being made, from 1 (one more after each that fp16 skipped); at evaluation the steps taken
    global_pairs: int  # pairs of the global batch (at evaluation: of the data set)
    global_tokens: int  # tokens of both sequences of those pairs, as tokenised and truncated by data.max_length


class PreferenceCollator:
    """Right-padded sequences, all chosen first, as TRL's DataCollatorForPreference lays them out.

    Two pairs, prompt 1 2 3 with chosen 4 5 and rejected 6, prompt 7 8 with chosen 9 and rejected 10 11:

        input_ids  1 2 3 4 5      completion_index     2 3 6 12 16 17      completion_sequence  0 0 1 2 3 3
                   7 8 9 0 0      completion_labels    4 5 9  6 10 11
                   1 2 3 6 0
                   7 8 10 11 0
    """

    def __init__(self, pad_token_id: int, data: DataSpec) -> None:
        self.pad_token_id = pad_token_id
        self.keep_last = data.keep_last  # keep_start was applied when the rows were tokenised

    def __call__(self, rows: list[Row], *, is_filler: bool = False) -> PairBatch:
        """B rows -> a batch; a filler's pairs weigh nothing."""
        sequences: list[list[int]] = []
        starts: list[int] = []  # of the completion within its sequence
        for side in ("chosen_ids", "rejected_ids"):
            for row in rows:
                sequence = row["prompt_ids"] + row[side]
                cut = max(0, len(sequence) - self.keep_last) if self.keep_last else 0
                sequences.append(sequence[cut:])
                starts.append(max(0, len(row["prompt_ids"]) - cut))
        width = max(map(len, sequences))
        input_ids = torch.full((len(sequences), width), self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        completion_mask = torch.zeros_like(input_ids)
        for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
            input_ids[i, : len(sequence)] = torch.tensor(sequence)
            attention_mask[i, : len(sequence)] = 1
            completion_mask[i, start : len(sequence)] = 1
        return batch_from_masks(rows, input_ids, attention_mask, completion_mask, is_filler)


def batch_from_masks(
    rows: list[Row],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_mask: torch.Tensor,
    is_filler: bool,
    ref_logps: torch.Tensor | None = None,
) -> PairBatch:
    """A PairBatch from TRL-shaped [2B, T] tensors. A completion token at position 0 has none before it: not scored."""
    sequence, before = completion_mask[:, 1:].nonzero(as_tuple=True)
    return PairBatch(
        pair_ids=torch.tensor([row["pair_id"] for row in rows]),
        pair_weights=torch.full((len(rows),), 0.0 if is_filler else 1.0, dtype=torch.float64),
        input_ids=input_ids,
        attention_mask=attention_mask,
        completion_index=sequence * input_ids.shape[1] + before,
        completion_labels=input_ids[sequence, before + 1],
        completion_sequence=sequence,
        ref_logps=ref_logps,
    )


class AdaptedCollator:
    """A user's collator: handed rows (and `context` where it has such a parameter); its dict becomes a PairBatch."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.collator: UserCollator = user_attribute("data.collator", path)
        try:
            if inspect.isclass(self.collator):
                self.collator = self.collator()
            self.wants_context = "context" in inspect.signature(self.collator).parameters
        except (TypeError, ValueError) as error:
            cure = "name a function of rows, or a class that needs no arguments"
            raise UserError("data.collator", path, f"cannot be called ({error})", cure) from None

    def __call__(self, rows: list[Row], context: CollateContext, *, is_filler: bool = False) -> PairBatch:
        """B rows -> a batch, by the user's code; a filler's pairs weigh nothing."""
        made = self.collator(rows, context=context) if self.wants_context else self.collator(rows)
        self._check(made, len(rows))
        known = [made[key] for key in ("ref_chosen_logps", "ref_rejected_logps") if key in made]
        ref_logps = torch.cat(known).double() if len(known) == 2 else None
        masks = made["attention_mask"], made["completion_mask"]
        return batch_from_masks(rows, made["input_ids"], *masks, is_filler, ref_logps)

    def _check(self, made: Any, pairs: int) -> None:
        """Refuse what does not have TRL's keys and shapes: it would train on something else in silence."""
        shapes = {key: tuple(value.shape) for key, value in made.items() if hasattr(value, "shape")} if made else made
        width = shapes["input_ids"][-1:] if shapes and shapes.get("input_ids") else ()
        wanted = dict.fromkeys(("input_ids", "attention_mask", "completion_mask"), (2 * pairs, *width))
        wanted |= {key: (pairs,) for key in ("ref_chosen_logps", "ref_rejected_logps") if shapes and key in shapes}
        if not shapes or any(shapes.get(key) != shape for key, shape in wanted.items()):
            raise UserError(
                "data.collator",
                self.path,
                f"returned {shapes} for {pairs} pairs",
                "return input_ids, attention_mask and completion_mask of shape [2 * pairs, tokens], chosen half first",
            )


def user_attribute(key: str, path: str) -> Any:
    """The object that a user's module:attr names.

    Raises:
        UserError: the module cannot be imported, or has no such attribute.
    """
    module, _, attribute = path.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ImportError as error:
        raise UserError(
            key,
            path,
            f"cannot be imported ({error})",
            "give the command in the folder that holds the module, or install it",
        ) from None
    except AttributeError:
        raise UserError(key, path, f"module {module} has no {attribute}", "check the name after the colon") from None
