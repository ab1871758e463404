"""Collate rows of token ids into a PairBatch, packed or padded, with built-in or user collators.

Shapes: B pairs, 2B sequences (all chosen, then all rejected), R rows, T tokens of a row, C
completion tokens that are scored, N positions that score them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import mul
from typing import Any, NamedTuple

import numpy as np
import torch

from orchestrator.data.order import Integers
from orchestrator.data.pairs import PairRow
from orchestrator.data.tokens import common_prefix
from orchestrator.settings.data import DataSpec


class Counts(NamedTuple):
    """Denominators of a step's means: counts of the GLOBAL batch, equal on every rank; pairs count
    by weight.
    """

    pairs: float
    chosen_tokens: float  # scored tokens of the chosen completions

    @classmethod
    def total(cls, parts: Iterable["Counts"]) -> "Counts":
        """Return the sum of all parts."""
        return cls(*map(sum, zip(*parts, strict=True)))


class PairSpan(NamedTuple):
    """Positions of a pair in a packed row: shared | rest of the chosen | rest of the rejected
    sequence.
    """

    start: int
    fork: int  # end of the shared part: the prompt, and the common prefix of the completions
    # start of the rest of the rejected sequence; start..rejected is the whole chosen sequence
    rejected: int
    stop: int
    scored: int  # the first position that predicts a completion token; stop if none does


class Segments(NamedTuple):
    """Attention pattern of a packed row: causal attention within each sequence of each pair.

    For variable-length kernels, a pair is two runs of queries, start..rejected and rejected..stop,
    over the keys start..rejected and start..fork + rejected..stop; each run is aligned with the end
    of its keys.
    """

    spans: tuple[PairSpan, ...]  # [B], on the host
    scoring: torch.Tensor  # [N] the positions that predict a completion token, ascending
    query_bounds: torch.Tensor  # [2B + 1] int32
    key_bounds: torch.Tensor  # [2B + 1] int32
    key_index: torch.Tensor  # [keys of all runs] positions in the row
    own_key: torch.Tensor  # [T] inverse: the index in key_index of each position in its own run
    # [S] positions start..fork, which are also keys of their pair's second run
    shared: torch.Tensor
    shared_key: torch.Tensor  # [S] their indices in key_index in that run
    longest: tuple[int, int]  # queries and keys of the longest run, on the host


class PairBatch(NamedTuple):
    """One micro-batch. All indices of tokens are computed on the host: computing them on a GPU
    would stall it.

    Packed: one row, with position_ids and segments. Padded: 2B rows, with attention_mask. The
    scored completion tokens are ordered by pair: chosen and rejected of the first pair, chosen and
    rejected of the second, ...
    """

    pair_ids: torch.Tensor  # [B]
    pair_weights: torch.Tensor  # [B] 1, or data.weight_column; 0 only in a filler
    input_ids: torch.Tensor  # [R, T]
    position_ids: torch.Tensor | None  # [1, T]
    attention_mask: torch.Tensor | None  # [2B, T] 0 on padding
    segments: Segments | None
    sequence_tokens: torch.Tensor  # [2B] tokens of prompt and completion
    # [2B] tokens of the completion, including the unscored first one of an empty prompt
    completion_tokens: torch.Tensor
    # [C] into the flat [R * T] hidden states: the position BEFORE each token
    completion_index: torch.Tensor
    completion_labels: torch.Tensor  # [C] the token to predict there
    # [2B] number of scored tokens of each sequence, on the host, in the order of the tokens
    scored: tuple[int, ...]
    ref_logps: torch.Tensor | None  # [2B] log-probs of the reference, if already known
    # [B, 3] for losses over the global batch, after its first pass: the pair's loss, and its
    # derivatives with respect to the log-probs of the chosen and the rejected completion
    of_batch: torch.Tensor | None = None
    margins: torch.Tensor | None = None  # [B] data.margin_column: the target margin

    def to(self, device: torch.device) -> "PairBatch":
        """Return the batch on another device."""
        return self._make(_moved(value, device) for value in self)

    @property
    def counts(self) -> Counts:
        """Return the counts of this micro-batch, without fillers; on the host."""
        weights = self.pair_weights.tolist()
        return Counts(sum(weights), sum(map(mul, self.scored[::2], weights)))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Segments):
        return Segments(*(_moved(part, device) for part in value))
    return value


@dataclass(frozen=True)
class CollateContext:
    """Information about the batch for a distribution-aware collator."""

    rank: int
    world_size: int
    # the step to collate, from 1 (one more after each that fp16 skipped); in evaluation the steps
    # taken
    step: int
    global_pairs: int  # pairs of the global batch (in evaluation: of the data set)
    # tokens of both sequences of those pairs, as tokenised and truncated by data.max_length
    global_tokens: int


class FedSequence(NamedTuple):
    """Token ids of one prompt and completion after truncation."""

    ids: Integers
    completion: int  # start of the completion

    @property
    def labels(self) -> Integers:
        """Return the scored completion tokens; a token at position 0 has no predecessor and is not
        scored.
        """
        return self.ids[max(self.completion, 1) :]

    @property
    def before(self) -> Integers:
        """Return the position before each label."""
        return np.arange(len(self.ids) - len(self.labels) - 1, len(self.ids) - 1)


def fed_sequences(row: PairRow, keep_last: int | None) -> tuple[FedSequence, FedSequence]:
    """Return the chosen and the rejected sequence, each cut to its last `keep_last` tokens
    (keep_end).

    Tokenising already applied keep_start.
    """
    sequences: list[FedSequence] = []
    for side in ("chosen_ids", "rejected_ids"):
        ids = np.array(row["prompt_ids"] + row[side], np.int64)
        cut = max(0, len(ids) - keep_last) if keep_last else 0
        sequences.append(FedSequence(ids[cut:], max(0, len(row["prompt_ids"]) - cut)))
    return sequences[0], sequences[1]


class PackedCollator:
    """Collator that packs all pairs in one row without padding; the common prefix of a pair's
    sequences occurs once.

    Two pairs, prompt 1 2 3 with chosen 4 5 and rejected 6, prompt 7 8 with chosen 9 and rejected 10
    11:

        input_ids     1 2 3 4 5 6   7 8 9 10 11       completion_index   2 3   2   7   7  9
        position_ids  0 1 2 3 4 3   0 1 2  2  3       completion_labels  4 5   6   9  10 11
        spans         (0, 3, 5, 6, 2) (6, 8, 9, 11, 7)        scored       2   1   1   2
    """

    def __init__(self, data: DataSpec) -> None:
        self.keep_last = data.keep_last

    def __call__(self, rows: list[PairRow], *, is_filler: bool = False) -> PairBatch:
        """Collate B rows into a batch; the pairs of a filler have weight 0."""
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
            index += [
                start + chosen.before,
                np.where(before < shared, start, branch - shared) + before,
            ]
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
            sequence_tokens=torch.tensor(
                [len(pair[side].ids) for side in (0, 1) for pair in pairs]
            ),
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


def _of_pairs(rows: list[PairRow], is_filler: bool) -> dict[str, Any]:
    weights = [0.0 if is_filler else row.get("weight", 1.0) for row in rows]
    # all rows of a data set have a margin, or none
    margins = [row["margin"] for row in rows if "margin" in row]
    return {
        "pair_ids": torch.tensor([row["pair_id"] for row in rows]),
        "pair_weights": torch.tensor(weights, dtype=torch.float64),
        "margins": torch.tensor(margins, dtype=torch.float64) if margins else None,
    }


def _segments(spans: list[PairSpan], completion_index: Integers) -> Segments:
    queries = [length for s in spans for length in (s.rejected - s.start, s.stop - s.rejected)]
    keys = [
        length
        for s in spans
        for length in (s.rejected - s.start, s.fork - s.start + s.stop - s.rejected)
    ]
    key_index = [
        np.arange(*run)
        for s in spans
        for run in ((s.start, s.rejected), (s.start, s.fork), (s.rejected, s.stop))
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
    """Collator of right-padded sequences, all chosen first, in the layout of TRL's
    DataCollatorForPreference.

    Two pairs, prompt 1 2 3 with chosen 4 5 and rejected 6, prompt 7 8 with chosen 9 and rejected 10
    11:

        input_ids  1 2 3 4 5      completion_index     2 3  12   6  16 17      scored  2 1 1 2
                   7 8 9 0 0      completion_labels    4 5   6   9  10 11
                   1 2 3 6 0
                   7 8 10 11 0
    """

    def __init__(self, pad_token_id: int, data: DataSpec) -> None:
        self.pad_token_id = pad_token_id
        self.keep_last = data.keep_last

    def __call__(self, rows: list[PairRow], *, is_filler: bool = False) -> PairBatch:
        """Collate B rows into a batch; the pairs of a filler have weight 0."""
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
    rows: list[PairRow],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_mask: torch.Tensor,
    is_filler: bool,
    ref_logps: torch.Tensor | None = None,
) -> PairBatch:
    """Return a PairBatch from [2B, T] tensors in TRL's layout.

    A completion token at position 0 is not scored.
    """
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
