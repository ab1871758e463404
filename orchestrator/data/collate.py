"""Rows of token ids -> one PairBatch, packed or padded, by our collators or by a user's.

Legend: B pairs, 2B sequences (all chosen, then all rejected), R rows, T tokens of a row, C completion tokens that are
scored, N positions that score them.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import mul
from typing import Any, NamedTuple

import numpy as np
import torch

from orchestrator.data.order import Integers
from orchestrator.data.tokens import common_prefix
from orchestrator.data.user_code import called, user_attribute
from orchestrator.settings.spec import DataSpec, UserCodeSpec, UserError

Row = dict[str, Any]
UserCollator = Callable[..., dict[str, torch.Tensor]]


class Counts(NamedTuple):
    """What the sums of a step are divided by: counts of the GLOBAL batch, the same on every rank. A pair counts as
    often as its weight says."""

    pairs: float
    chosen_tokens: float  # of the chosen completions, those that are scored

    @classmethod
    def total(cls, parts: Iterable["Counts"]) -> "Counts":
        """Of all parts together."""
        return cls(*map(sum, zip(*parts, strict=True)))


class PairSpan(NamedTuple):
    """Where one pair lies in a packed row: shared | rest of the chosen | rest of the rejected sequence."""

    start: int
    fork: int  # end of what both sequences begin with: the prompt, and what their completions have in common
    rejected: int  # where the rest of the rejected sequence begins; start..rejected is the whole chosen sequence
    stop: int
    scored: int  # the first position that predicts a completion token; stop if none does


class Segments(NamedTuple):
    """How the tokens of a packed row see each other: within its pair, each sees its own sequence up to itself.

    For kernels over sequences of any length, a pair is two runs of queries, start..rejected and rejected..stop, over
    the keys start..rejected and start..fork + rejected..stop; each run is aligned with the end of its keys.
    """

    spans: tuple[PairSpan, ...]  # [B], on the host
    scoring: torch.Tensor  # [N] the positions that predict a completion token, ascending
    query_bounds: torch.Tensor  # [2B + 1] int32
    key_bounds: torch.Tensor  # [2B + 1] int32
    key_index: torch.Tensor  # [keys of all runs] positions in the row
    own_key: torch.Tensor  # [T] the way back: which of those keys a position is in its own run
    shared: torch.Tensor  # [S] positions start..fork, each of which is a key of its pair's second run as well
    shared_key: torch.Tensor  # [S] which one
    longest: tuple[int, int]  # queries and keys of the longest run, on the host


class PairBatch(NamedTuple):
    """One micro-batch. Everything that indexes tokens is made on the host: finding it on a GPU would stall it.

    Packed: one row, with position_ids and segments. Padded: 2B rows, with attention_mask. The scored completion tokens
    stand pair by pair: chosen and rejected of the first pair, chosen and rejected of the second, ...
    """

    pair_ids: torch.Tensor  # [B]
    pair_weights: torch.Tensor  # [B] how often each counts: 1, or by data.weight_column; 0 in a filler alone
    input_ids: torch.Tensor  # [R, T]
    position_ids: torch.Tensor | None  # [1, T]
    attention_mask: torch.Tensor | None  # [2B, T] 0 on padding
    segments: Segments | None
    sequence_tokens: torch.Tensor  # [2B] tokens of prompt and completion
    completion_tokens: torch.Tensor  # [2B] tokens of the completion, the unscored first one of an empty prompt too
    completion_index: torch.Tensor  # [C] into the flat [R * T] hidden states: the position BEFORE each token
    completion_labels: torch.Tensor  # [C] the token to predict there
    scored: tuple[int, ...]  # [2B] scored tokens of each sequence, on the host, in the order of the tokens
    ref_logps: torch.Tensor | None  # [2B] the reference's log-probs where they are known already
    # [B, 3] of the losses over the whole global batch, once all of it was seen: the pair's loss, and its slope by the
    # log-prob of the chosen and of the rejected completion
    of_batch: torch.Tensor | None = None
    margins: torch.Tensor | None = None  # [B] by data.margin_column: by how much more the chosen is to win

    def to(self, device: torch.device) -> "PairBatch":
        """The same batch on another device."""
        return self._make(_moved(value, device) for value in self)

    @property
    def counts(self) -> Counts:
        """Of this micro-batch alone, fillers left out; on the host."""
        weights = self.pair_weights.tolist()
        return Counts(sum(weights), sum(map(mul, self.scored[::2], weights)))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    return Segments(*(_moved(part, device) for part in value)) if isinstance(value, Segments) else value


@dataclass(frozen=True)
class CollateContext:
    """What a distribution-aware collator may know about the batch it is asked to make."""

    rank: int
    world_size: int
    step: int  # the step being made, from 1 (one more after each that fp16 skipped); at evaluation the steps taken
    global_pairs: int  # pairs of the global batch (at evaluation: of the data set)
    global_tokens: int  # tokens of both sequences of those pairs, as tokenised and truncated by data.max_length


class FedSequence(NamedTuple):
    """One prompt and completion as it is fed."""

    ids: Integers
    completion: int  # where the completion begins

    @property
    def labels(self) -> Integers:
        """The completion tokens that are scored; one at position 0 has none before it."""
        return self.ids[max(self.completion, 1) :]

    @property
    def before(self) -> Integers:
        """The position before each label."""
        return np.arange(len(self.ids) - len(self.labels) - 1, len(self.ids) - 1)


def fed_sequences(row: Row, keep_last: int | None) -> tuple[FedSequence, FedSequence]:
    """Chosen and rejected; keep_last (keep_end) cuts each from its start. keep_start was done at tokenising."""
    made: list[FedSequence] = []
    for side in ("chosen_ids", "rejected_ids"):
        ids = np.array(row["prompt_ids"] + row[side], np.int64)
        cut = max(0, len(ids) - keep_last) if keep_last else 0
        made.append(FedSequence(ids[cut:], max(0, len(row["prompt_ids"]) - cut)))
    return made[0], made[1]


class PackedCollator:
    """All pairs in one row, what a pair's two sequences begin with laid down once, nothing padded.

    Two pairs, prompt 1 2 3 with chosen 4 5 and rejected 6, prompt 7 8 with chosen 9 and rejected 10 11:

        input_ids     1 2 3 4 5 6   7 8 9 10 11       completion_index   2 3   2   7   7  9
        position_ids  0 1 2 3 4 3   0 1 2  2  3       completion_labels  4 5   6   9  10 11
        spans         (0, 3, 5, 6, 2) (6, 8, 9, 11, 7)        scored       2   1   1   2
    """

    def __init__(self, data: DataSpec) -> None:
        self.keep_last = data.keep_last

    def __call__(self, rows: list[Row], *, is_filler: bool = False) -> PairBatch:
        """B rows -> a batch; a filler's pairs weigh nothing."""
        pairs = [fed_sequences(row, self.keep_last) for row in rows]
        ids: list[Integers] = []
        positions: list[Integers] = []
        index: list[Integers] = []
        spans: list[PairSpan] = []
        start = 0
        for chosen, rejected in pairs:
            shared = common_prefix(chosen.ids, rejected.ids)
            fork, branch = start + shared, start + len(chosen.ids)
            stop = branch + len(rejected.ids) - shared
            ids += [chosen.ids, rejected.ids[shared:]]
            positions += [np.arange(len(chosen.ids)), np.arange(shared, len(rejected.ids))]
            before = rejected.before
            index += [start + chosen.before, np.where(before < shared, start, branch - shared) + before]
            scored = min((int(part[0]) for part in index[-2:] if len(part)), default=stop)
            spans.append(PairSpan(start, fork, branch, stop, scored))
            start = stop
        completion_index = np.concatenate(index)
        return PairBatch(
            **_of_pairs(rows, is_filler),
            input_ids=torch.from_numpy(np.concatenate(ids))[None],
            position_ids=torch.from_numpy(np.concatenate(positions))[None],
            attention_mask=None,
            segments=_segments(spans, completion_index),
            sequence_tokens=torch.tensor([len(pair[side].ids) for side in (0, 1) for pair in pairs]),
            completion_tokens=torch.tensor(
                [len(pair[side].ids) - pair[side].completion for side in (0, 1) for pair in pairs]
            ),
            completion_index=torch.from_numpy(completion_index),
            completion_labels=torch.from_numpy(
                np.concatenate([sequence.labels for pair in pairs for sequence in pair])
            ),
            scored=tuple(map(len, index)),
            ref_logps=None,
        )


def _of_pairs(rows: list[Row], is_filler: bool) -> dict[str, Any]:
    weights = [0.0 if is_filler else row.get("weight", 1.0) for row in rows]
    margins = [row["margin"] for row in rows if "margin" in row]  # all rows of a data set have one, or none
    return {
        "pair_ids": torch.tensor([row["pair_id"] for row in rows]),
        "pair_weights": torch.tensor(weights, dtype=torch.float64),
        "margins": torch.tensor(margins, dtype=torch.float64) if margins else None,
    }


def _segments(spans: list[PairSpan], completion_index: Integers) -> Segments:
    queries = [length for s in spans for length in (s.rejected - s.start, s.stop - s.rejected)]
    keys = [length for s in spans for length in (s.rejected - s.start, s.fork - s.start + s.stop - s.rejected)]
    key_index = [
        np.arange(*run) for s in spans for run in ((s.start, s.rejected), (s.start, s.fork), (s.rejected, s.stop))
    ]
    places = np.split(np.arange(sum(keys)), np.cumsum([len(part) for part in key_index])[:-1])
    own_key = [place for i, place in enumerate(places) if i % 3 != 1]
    return Segments(
        tuple(spans),
        torch.from_numpy(np.unique(completion_index)),
        torch.tensor(np.cumsum([0, *queries]), dtype=torch.int32),
        torch.tensor(np.cumsum([0, *keys]), dtype=torch.int32),
        torch.from_numpy(np.concatenate(key_index)),
        torch.from_numpy(np.concatenate(own_key)),
        torch.from_numpy(np.concatenate(key_index[1::3])),
        torch.from_numpy(np.concatenate(places[1::3])),
        (max(queries), max(keys)),
    )


class PreferenceCollator:
    """Right-padded sequences, all chosen first, as TRL's DataCollatorForPreference lays them out.

    Two pairs, prompt 1 2 3 with chosen 4 5 and rejected 6, prompt 7 8 with chosen 9 and rejected 10 11:

        input_ids  1 2 3 4 5      completion_index     2 3  12   6  16 17      scored  2 1 1 2
                   7 8 9 0 0      completion_labels    4 5   6   9  10 11
                   1 2 3 6 0
                   7 8 10 11 0
    """

    def __init__(self, pad_token_id: int, data: DataSpec) -> None:
        self.pad_token_id = pad_token_id
        self.keep_last = data.keep_last

    def __call__(self, rows: list[Row], *, is_filler: bool = False) -> PairBatch:
        """B rows -> a batch; a filler's pairs weigh nothing."""
        pairs = [fed_sequences(row, self.keep_last) for row in rows]
        sequences = [pair[side] for side in (0, 1) for pair in pairs]
        width = max(len(sequence.ids) for sequence in sequences)
        input_ids = torch.full((len(sequences), width), self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        completion_mask = torch.zeros_like(input_ids)
        for i, (ids, completion) in enumerate(sequences):
            input_ids[i, : len(ids)] = torch.from_numpy(ids)
            attention_mask[i, : len(ids)] = 1
            completion_mask[i, completion : len(ids)] = 1
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
    pairs, width = len(rows), input_ids.shape[1]
    # rows in the order chosen, rejected of the first pair, chosen, rejected of the second, ...
    pair_by_pair = torch.arange(2 * pairs).view(2, pairs).t().flatten()
    scored = completion_mask[pair_by_pair, 1:] != 0
    place, before = scored.nonzero(as_tuple=True)
    sequence = pair_by_pair[place]
    return PairBatch(
        **_of_pairs(rows, is_filler),
        input_ids=input_ids,
        position_ids=None,
        attention_mask=attention_mask,
        segments=None,
        sequence_tokens=attention_mask.sum(1),
        completion_tokens=completion_mask.sum(1),
        completion_index=sequence * width + before,
        completion_labels=input_ids[sequence, before + 1],
        scored=tuple(scored.sum(1).tolist()),
        ref_logps=ref_logps,
    )


class AdaptedCollator:
    """A user's collator: handed rows (and `context` where it has such a parameter); its dict becomes a PairBatch."""

    def __init__(self, collator: UserCollator | UserCodeSpec, pad_token_id: int, vocabulary: int | None = None) -> None:
        """collator: of a Python user, or of the settings. pad_token_id: for a class whose constructor has it.
        vocabulary: the number of tokens that the model has, if known."""
        self.vocabulary = vocabulary
        made: Any
        if isinstance(collator, UserCodeSpec):
            self.key, self.name, kwargs = "data.collator", collator.path, collator.kwargs
            made = user_attribute(self.key, self.name)
        else:
            self.key, self.name, kwargs = "data_collator", getattr(collator, "__name__", type(collator).__name__), {}
            made = collator
        try:
            if inspect.isclass(made):
                padding = {"pad_token_id": pad_token_id} if "pad_token_id" in inspect.signature(made).parameters else {}
                made = made(**padding | kwargs)
            elif kwargs:
                made = partial(made, **kwargs)
            self.wants_context = "context" in inspect.signature(made).parameters
        except (TypeError, ValueError) as error:
            cure = "give a function of rows, or a class, with its arguments as {path, kwargs}"
            raise UserError(self.key, self.name, f"cannot be called ({error})", cure) from None
        self.collator: UserCollator = made

    def __call__(self, rows: list[Row], context: CollateContext, *, is_filler: bool = False) -> PairBatch:
        """B rows -> a batch, by the user's code; a filler's pairs weigh nothing."""
        pairs, whole = len(rows), {id(row): dict(row) for row in rows}
        told = {"context": context} if self.wants_context else {}
        numbers = ", ".join(str(row["pair_id"]) for row in rows)
        where = f"step {context.step}, rank {context.rank}, pairs {numbers:.60}"
        made = called(self.key, self.name, where, self.collator, rows, **told)
        self._check(made, pairs)
        rows = [whole.get(id(row), row) for row in rows]  # it may have sorted them, and taken out keys
        known = [made[key] for key in ("ref_chosen_logps", "ref_rejected_logps") if key in made]
        ref_logps = torch.cat(known).double() if len(known) == 2 else None
        masks = made["attention_mask"], made["completion_mask"]
        return batch_from_masks(rows, made["input_ids"], *masks, is_filler, ref_logps)

    def _check(self, made: Any, pairs: int) -> None:
        """Refuse what does not have TRL's keys, shapes and types: it would train on something else in silence."""
        is_dict = isinstance(made, Mapping)
        shapes = {key: _shape(value) for key, value in made.items()} if is_dict else {}
        ids = made.get("input_ids") if is_dict else None
        width = ids.shape[-1:] if isinstance(ids, torch.Tensor) else ()
        wanted = dict.fromkeys(("input_ids", "attention_mask", "completion_mask"), (2 * pairs, *width))
        wanted |= {key: (pairs,) for key in ("ref_chosen_logps", "ref_rejected_logps") if key in shapes}
        if not isinstance(ids, torch.Tensor) or any(shapes.get(key) != shape for key, shape in wanted.items()):
            raise UserError(
                self.key,
                self.name,
                f"returned {shapes if is_dict else type(made).__name__} for {pairs} pairs",
                "return input_ids, attention_mask and completion_mask of shape [2 * pairs, tokens], chosen half first, "
                "as tensors",
            )
        if ids.is_floating_point() or (ids < 0).any():
            rule = f"returned input_ids of {ids.dtype}, the least {ids.min().item()}"
            raise UserError(self.key, self.name, rule, "return integers from 0 on, on padding as well")
        if self.vocabulary is not None and (largest := int(ids.max())) >= self.vocabulary:
            rule = f"returned token {largest}, and the model has {self.vocabulary} tokens"
            raise UserError(self.key, self.name, rule, f"return ids below {self.vocabulary}, on padding as well")


def _shape(value: Any) -> tuple[int, ...] | str:
    """Of a tensor; of anything else the name of its type."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
