"""Usable pairs of one or more tokenised data sets, memory-mapped."""

import bisect
import copy
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.order import Integers, Share
from orchestrator.data.row import NUMERIC
from orchestrator.data.sources import Place, one_of

PairRow = dict[str, Any]
"""A pair as input of a collator: pair_id, prompt_ids, chosen_ids and rejected_ids, and weight and
margin if the settings name their columns.
"""

# Counts of rows, in the cache and in Pairs.
COUNTED = ("dropped", "unread", "unread_columns", "notes")


class TokenizedSet(NamedTuple):
    """One data set in the cache."""

    key: str  # the setting of the data set
    source: str
    weight: float  # how often its pairs are seen in an epoch
    folder: Path

    @property
    def dropped(self) -> dict[str, int]:
        """Return the number of dropped rows, by reason."""
        return self._meta["dropped"]

    @property
    def unread(self) -> dict[str, int]:
        """Return the number of rows with a variable that their chat template does not read, by
        variable.
        """
        return self._meta["unread"]

    @property
    def unread_columns(self) -> dict[str, int]:
        """Return the number of rows with a value in a column that is not read, by column."""
        return self._meta["unread_columns"]

    @property
    def notes(self) -> dict[str, int]:
        """Return the number of rows with a note, by the notes of data/shapes.py."""
        return self._meta["notes"]

    @property
    def _meta(self) -> dict[str, Any]:
        return json.loads((self.folder / "meta.json").read_text())

    @property
    def uncut_lengths(self) -> Integers:
        """Return [M, 3] tokens of prompt, chosen and rejected before truncation, for every row that
        could be tokenised, including those dropped later.
        """
        return np.load(self.folder / "uncut.npy").reshape(-1, 3)


class Pairs:
    """Usable pairs of one or more data sets, memory-mapped: tokens are read only when needed.

    pair_ids: [N] ascending row numbers, counted from 1 and continued from one source to the next,
        including rows without a usable pair.
    lengths: [N, 3] tokens of prompt, chosen and rejected.
    hashes: [N, 2] 128-bit hashes of the token ids of each pair.
    swapped: [N] the first half of the hash with chosen and rejected exchanged.
    weights, margins: [N] fp64 values of data.weight_column and data.margin_column, or None if these
        are not set.
    dropped, unread, unread_columns, notes: counts of rows as in TokenizedSet.
    """

    def __init__(self, sets: Sequence[TokenizedSet]) -> None:
        self.sets = list(sets)
        folders = [each.folder for each in sets]
        metas = [json.loads((folder / "meta.json").read_text()) for folder in folders]
        self.dropped, self.unread, self.unread_columns, self.notes = (
            dict(sum((Counter(meta[name]) for meta in metas), Counter[str]())) for name in COUNTED
        )
        self.largest_id: int = max(meta["largest_id"] for meta in metas)
        row_numbers, lengths = _arrays(folders, "rows"), _arrays(folders, "lengths")
        rows = [
            len(usable) + sum(meta["dropped"].values())
            for usable, meta in zip(row_numbers, metas, strict=True)
        ]
        self._rows_before: list[int] = list(accumulate(rows[:-1], initial=0))
        of_sets = zip(row_numbers, self._rows_before, strict=True)
        self.pair_ids: Integers = _concatenated([numbers + before for numbers, before in of_sets])
        self.lengths: Integers = _concatenated(lengths)
        self.hashes: NDArray[np.uint64] = _concatenated(_arrays(folders, "hashes", mapped=True))
        self.swapped: NDArray[np.uint64] = _concatenated(_arrays(folders, "swapped"))
        # all folders have the file, or none
        numeric = {
            name: _concatenated(_arrays(folders, name))
            for name in NUMERIC
            if (folders[0] / f"{name}.npy").exists()
        }
        self.weights: NDArray[np.float64] | None = numeric.get("weights")
        self.margins: NDArray[np.float64] | None = numeric.get("margins")
        self._starts: Integers = _concatenated(
            [each.sum(axis=1).cumsum() - each.sum(axis=1) for each in lengths]
        )
        self._tokens: list[NDArray[np.int32]] = _arrays(folders, "tokens", mapped=True)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def identity(self) -> str:
        """Return a hash of rows, tokenizer and truncation of all sets."""
        return one_of([each.folder.name for each in self.sets])

    @property
    def shares(self) -> tuple[Share, ...]:
        """Return the share of each set in an epoch."""
        ends = [*np.searchsorted(self.pair_ids, self._rows_before[1:], side="right"), len(self)]
        of_sets = zip(np.diff(ends, prepend=0), self.sets, strict=True)
        return tuple(Share.of(int(pairs), each.weight) for pairs, each in of_sets)

    @property
    def pairs_per_epoch(self) -> int:
        """Return the number of pairs in an epoch."""
        return sum(share.per_epoch for share in self.shares)

    def place(self, pair_id: int) -> Place:
        """Return the source row of a pair."""
        of = self._set_of(pair_id)
        return Place(self.sets[of].key, self.sets[of].source, int(pair_id) - self._rows_before[of])

    def only(self, indices: Integers) -> "Pairs":
        """Return the pairs at some indices, in the order of their rows."""
        few, kept = copy.copy(self), np.sort(indices)
        few.dropped, few.unread, few.unread_columns, few.notes = {}, {}, {}, {}
        few.swapped = self.swapped[kept]
        few.pair_ids, few.lengths = self.pair_ids[kept], self.lengths[kept]
        few.hashes = self.hashes[kept]
        few.weights = None if self.weights is None else self.weights[kept]
        few.margins = None if self.margins is None else self.margins[kept]
        few._starts = self._starts[kept]
        return few

    def tokens(self, index: int) -> NDArray[np.int32]:
        """Return the concatenated token ids of prompt, chosen and rejected of one pair."""
        start = self._starts[index]
        of_set = self._tokens[self._set_of(self.pair_ids[index])]
        return of_set[start : start + self.lengths[index].sum()]

    def __getitem__(self, index: int) -> PairRow:
        """Return one pair as input of a collator: pair_id, lists of token ids under TRL's names,
        and weight and margin if they are set.
        """
        prompt, chosen, _ = self.lengths[index]
        tokens = self.tokens(index).tolist()
        row: PairRow = {
            "pair_id": int(self.pair_ids[index]),
            "prompt_ids": tokens[:prompt],
            "chosen_ids": tokens[prompt : prompt + chosen],
            "rejected_ids": tokens[prompt + chosen :],
        }
        for name, numbers in (("weight", self.weights), ("margin", self.margins)):
            if numbers is not None:
                row[name] = float(numbers[index])
        return row

    def prompts(self) -> Iterator[bytes]:
        """Yield the prompt of each pair as bytes, 4 per token id."""
        for pair_id, start, length in zip(
            self.pair_ids, self._starts, self.lengths[:, 0], strict=True
        ):
            yield self._tokens[self._set_of(pair_id)][start : start + length].tobytes()

    def _set_of(self, pair_id: int) -> int:
        return bisect.bisect_left(self._rows_before, pair_id) - 1


def _arrays(folders: Sequence[Path], name: str, mapped: bool = False) -> list[Any]:
    """Load the array of that name from each folder."""
    mode = "r" if mapped else None
    return [np.load(folder / f"{name}.npy", mmap_mode=mode) for folder in folders]


def _concatenated(arrays: list[Any]) -> Any:
    """Concatenate arrays; a single one is returned as it is, which may be memory-mapped."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
