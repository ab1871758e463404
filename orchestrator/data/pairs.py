"""Tokenise preference rows once, in parallel, into a memory-mapped cache.

It uses no World and no collectives: the first process that gets the lock builds the cache, and the
others poll for the finished files, so no rank waits in a collective whose time-out would kill the
run.
"""

import bisect
import copy
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.order import Integers, Share
from orchestrator.data.shapes import NUMERIC, BadRow, Row, checked, numbers_of
from orchestrator.data.sources import Place, bad_row_error, check_source, one_of, open_source
from orchestrator.data.tokens import (
    TokenizedPair,
    tokenize_checked,
    tokenizer_identity,
    truncated,
    unread_variables,
)
from orchestrator.settings.data import DataSpec, Split, TrainingSetSpec
from orchestrator.settings.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FORMAT = 6  # of the cache; increase it when the meaning of a cached number changes
CHUNK = 512  # rows sent to a tokenising process at a time
PARALLEL_FROM = 4 * CHUNK  # rows below which starting processes costs more than they save

# Settings of `data` that determine the cache's content; data.chat_template is part of the
# tokenizer.
CACHED = (
    "max_length",
    "truncation",
    "max_prompt_length",
    "max_completion_length",
    "system_prompt",
    "chat_template_kwargs",
    "on_bad_row",
    "ignore_columns",
    "weight_column",
    "margin_column",
)


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
        numbers, lengths = (
            [np.load(folder / f"{name}.npy") for folder in folders] for name in ("rows", "lengths")
        )
        rows = [
            len(kept) + sum(meta["dropped"].values())
            for kept, meta in zip(numbers, metas, strict=True)
        ]
        self._rows_before: list[int] = list(accumulate(rows[:-1], initial=0))
        of_sets = zip(numbers, self._rows_before, strict=True)
        self.pair_ids: Integers = _joined([kept + before for kept, before in of_sets])
        self.lengths: Integers = _joined(lengths)
        self.hashes: NDArray[np.uint64] = _joined(
            [np.load(folder / "hashes.npy", mmap_mode="r") for folder in folders]
        )
        self.swapped: NDArray[np.uint64] = _joined(
            [np.load(folder / "swapped.npy") for folder in folders]
        )
        kept = [
            name for name in NUMERIC if (folders[0] / f"{name}.npy").exists()
        ]  # then all folders have it
        numeric = {
            name: _joined([np.load(folder / f"{name}.npy") for folder in folders]) for name in kept
        }
        self.weights: NDArray[np.float64] | None = numeric.get("weights")
        self.margins: NDArray[np.float64] | None = numeric.get("margins")
        self._starts: Integers = _joined(
            [each.sum(axis=1).cumsum() - each.sum(axis=1) for each in lengths]
        )
        self._tokens: list[NDArray[np.int32]] = [
            np.load(folder / "tokens.npy", mmap_mode="r") for folder in folders
        ]

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
        few.pair_ids, few.lengths, few.hashes = (
            self.pair_ids[kept],
            self.lengths[kept],
            self.hashes[kept],
        )
        few.weights = None if self.weights is None else self.weights[kept]
        few.margins = None if self.margins is None else self.margins[kept]
        few._starts = self._starts[kept]
        return few

    def tokens(self, index: int) -> NDArray[np.int32]:
        """Return the concatenated token ids of prompt, chosen and rejected of one pair."""
        start = self._starts[index]
        return self._tokens[self._set_of(self.pair_ids[index])][
            start : start + self.lengths[index].sum()
        ]

    def __getitem__(self, index: int) -> Row:
        """Return one pair as input of a collator: pair_id, lists of token ids under TRL's names,
        and weight and margin if they are set.
        """
        prompt, chosen, _ = self.lengths[index]
        tokens = self.tokens(index).tolist()
        row: Row = {
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


def _joined(parts: list[Any]) -> Any:
    """Concatenate arrays; a single one is returned as it is, which may be memory-mapped."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class NoPairs(UserError):
    """Error for a source without a usable row."""


def tokenized_pairs(
    data: DataSpec,
    split: Split,
    tokenizer: "PreTrainedTokenizerBase",
    cache_dir: Path,
    name: str = "",
    first: int | None = None,
) -> Pairs:
    """Return the pairs of data.train or of the evaluation set with that name, from the cache, which
    is built if it does not exist. first: use only so many rows of each source.

    Raises:
        UserError: a source is missing or unreadable, a row cannot be used, or (NoPairs) no row is
            left.
    """
    of_tokenizer, sets = tokenizer_identity(tokenizer), list[TokenizedSet]()
    for key, source in data.sources(split, name).items():
        check_source(key, source.path)
        rows, identity = open_source(key, source, split)
        rows, identity = (
            (rows, identity)
            if first is None
            else (islice(rows, first), f"{identity} first {first}")
        )
        folder = cache_dir / "pairs" / _digest(identity, of_tokenizer, data)
        build_once(
            folder,
            partial(_build, key=key, source=source.path, rows=rows, tokenizer=tokenizer, data=data),
        )
        sets.append(
            TokenizedSet(
                key,
                source.path,
                source.weight if isinstance(source, TrainingSetSpec) else 1.0,
                folder,
            )
        )
    return Pairs(sets)


def without_held_out(pairs: Pairs, fraction: float, seed: int) -> tuple[Pairs, Pairs]:
    """Split pairs into (training pairs, evaluation pairs): hold out all pairs of some prompts,
    chosen by a hash of their tokens and the seed, as close to the fraction as possible.

    Raises:
        UserError: a training set or the evaluation set would be empty.
    """
    key = str(seed).encode()
    hashes = (
        hashlib.blake2b(prompt, digest_size=8, key=key).digest() for prompt in pairs.prompts()
    )
    _, prompts, sizes = np.unique(
        np.frombuffer(b"".join(hashes), "<u8"), return_inverse=True, return_counts=True
    )
    left, is_out = fraction * len(pairs), np.zeros(len(sizes), np.bool_)
    for prompt, size in enumerate(sizes.tolist()):
        if size <= left:
            is_out[prompt], left = True, left - size
    smallest = np.where(is_out, len(pairs) + 1, sizes).argmin()
    if sizes[smallest] < 2 * left:  # closer to the fraction with it than without
        is_out[smallest] = True
    held = is_out[prompts]
    train, held_out = pairs.only(np.flatnonzero(~held)), pairs.only(np.flatnonzero(held))
    for name in COUNTED:  # counts of all rows, as dropped rows belong to neither part
        setattr(train, name, getattr(pairs, name))
    gone = next(
        (each for each, share in zip(pairs.sets, train.shares, strict=True) if not share.pairs),
        None,
    )
    if gone is not None or not len(held_out):
        which = f"every pair of {gone.source}" if gone else "none"
        rule = f"holds out {which}, of {len(pairs)} pairs with {len(sizes)} prompts"
        cure = (
            "lower it, or set data.eval to a file"
            if gone
            else "raise it, or set data.eval to a file"
        )
        raise UserError("data.eval_fraction", fraction, rule, cure)
    return train, held_out


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Create a folder with `build(partial_folder)` in exactly one process; the other callers poll
    until it exists.

    The lock is released when its holder dies, so the next process replaces a killed builder.
    """
    if folder.exists():
        return  # readers of the cache need no permission to write the lock
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        while not folder.exists():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
                continue
            if folder.exists():
                return
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            build(partial)
            os.rename(partial, folder)


def _digest(identity: str, tokenizer: str, data: DataSpec) -> str:
    key = [FORMAT, identity, tokenizer, *(getattr(data, name) for name in CACHED)]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


class _TokenizedRow(NamedTuple):
    number: int
    result: TokenizedPair | BadRow
    uncut: (
        tuple[int, int, int] | None
    )  # tokens of prompt, chosen and rejected before truncation, if it has any
    numbers: dict[str, float] = {}  # by the names of NUMERIC
    unread: list[str] = []  # variables that the chat template does not read
    unread_columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class _Worker(NamedTuple):
    """Picklable callable that tokenises chunks of rows, in this or another process."""

    tokenizer: "PreTrainedTokenizerBase"
    data: DataSpec

    def __call__(self, chunk: list[tuple[int, Any]]) -> list[_TokenizedRow]:
        return [self._tokenized(number, row) for number, row in chunk]

    def _tokenized(self, number: int, row: Any) -> _TokenizedRow:
        uncut = None
        try:
            result = checked(row, self.data)
            is_tie = (
                result.row["chosen"] == result.row["rejected"]
            )  # ties are dropped, so their numbers are not checked
            numbers = {} if is_tie else numbers_of(result.row, self.data)
            whole, _ = tokenize_checked(result.row, self.tokenizer, self.data)
            uncut = len(whole.prompt_ids), len(whole.chosen_ids), len(whole.rejected_ids)
            unread = unread_variables(result.row, self.tokenizer, self.data)
            pair = truncated(whole, self.data)
            return _TokenizedRow(number, pair, uncut, numbers, unread, result.unread, result.notes)
        except BadRow as bad:
            bad.row = row
            return _TokenizedRow(number, bad, uncut)


def _build(
    folder: Path,
    key: str,
    source: str,
    rows: Iterable[tuple[int, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    data: DataSpec,
) -> None:
    numbers: list[int] = []
    lengths: list[tuple[int, int, int]] = []
    uncut_lengths: list[tuple[int, int, int]] = []
    tokens: list[np.ndarray] = []
    hashes: list[bytes] = []
    swapped: list[bytes] = []
    numeric: dict[str, list[float]] = {
        name: [] for name, key in NUMERIC.items() if getattr(data, key) is not None
    }
    counts: dict[str, Counter[str]] = {name: Counter() for name in COUNTED}
    first_bad: dict[str, str] = {}  # by the reason for dropping rows
    for number, result, uncut, of_pair, *noted in _tokenized(rows, _Worker(tokenizer, data)):
        if uncut is not None:
            uncut_lengths.append(uncut)
        if isinstance(result, BadRow):
            if error := bad_row_error(key, source, number, result, data):
                raise error
            counts["dropped"][result.kind] += 1
            first_bad.setdefault(result.kind, f"row {number} {result.reason}")
            continue
        numbers.append(number)
        lengths.append((len(result.prompt_ids), len(result.chosen_ids), len(result.rejected_ids)))
        tokens.append(
            np.array(result.prompt_ids + result.chosen_ids + result.rejected_ids, np.int32)
        )
        hashes.append(content_hash(lengths[-1], tokens[-1]))
        swapped.append(_swapped_hash(result))
        for name, values in zip(COUNTED[1:], noted, strict=True):
            counts[name].update(values)
        for name, column in numeric.items():
            column.append(of_pair[name])
    if not numbers:
        raise _no_pair(key, source, counts["dropped"], first_bad)
    np.save(folder / "tokens.npy", np.concatenate(tokens))
    np.save(folder / "lengths.npy", np.array(lengths, np.int64))
    np.save(folder / "uncut.npy", np.array(uncut_lengths, np.int64))
    np.save(folder / "hashes.npy", np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 2))
    np.save(folder / "swapped.npy", np.frombuffer(b"".join(swapped), "<u8").reshape(-1, 2)[:, 0])
    np.save(folder / "rows.npy", np.array(numbers, np.int64))
    for name, column in numeric.items():
        np.save(folder / f"{name}.npy", np.array(column, np.float64))
    largest_id = max(int(ids.max()) for ids in tokens)
    meta = {
        "source": source,
        "largest_id": largest_id,
        **{name: dict(counts[name]) for name in COUNTED},
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def _no_pair(key: str, source: str, dropped: Counter[str], first: dict[str, str]) -> NoPairs:
    """Return the error for a source without a usable row. first: the first row of each reason."""
    if not dropped:
        return NoPairs(
            key, source, "leaves no pair to train on (it has no rows)", "use a file with rows"
        )
    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    cure = "check that its chosen and rejected differ"
    if "prompts that fill data.max_length" in dropped:
        cure = "raise data.max_length"
    elif "malformed rows" in first:
        cure = f"fix them: {first['malformed rows']}"
    return NoPairs(key, source, f"leaves no pair to train on ({counts})", cure)


def _swapped_hash(pair: TokenizedPair) -> bytes:
    """Return the content hash of the pair whose chosen and rejected are exchanged."""
    prompt, chosen, rejected = pair
    tokens = np.array(prompt + rejected + chosen, np.int32)
    return content_hash((len(prompt), len(rejected), len(chosen)), tokens)


def content_hash(lengths: Iterable[int], tokens: NDArray[np.int32]) -> bytes:
    """Return a 128-bit hash of the token ids of a pair and the lengths [3] of prompt, chosen and
    rejected.
    """
    whole = np.array([*lengths], "<i4").tobytes() + tokens.astype("<i4").tobytes()
    return hashlib.blake2b(whole, digest_size=16).digest()


def _tokenized(rows: Iterable[tuple[int, Any]], worker: _Worker) -> Iterator[_TokenizedRow]:
    iterator = iter(rows)
    first = list(islice(iterator, PARALLEL_FROM))
    processes = worker.data.num_proc or min(os.cpu_count() or 1, 16)
    if len(first) < PARALLEL_FROM or processes == 1:
        for chunk in _chunks(iter(first), iterator):
            yield from worker(chunk)
        return
    # spawn: forking a process in which torch or ray already run threads can deadlock
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        chunks = _chunks(iter(first), iterator)
        waiting = [(chunk, pool.submit(worker, chunk)) for chunk in islice(chunks, 2 * processes)]
        while waiting:  # a bounded window: the whole file is never in memory
            yield from tokenized_elsewhere(*waiting.pop(0), worker)
            waiting += [(chunk, pool.submit(worker, chunk)) for chunk in islice(chunks, 1)]


def tokenized_elsewhere(
    chunk: list[tuple[int, Any]], result: Future[list[_TokenizedRow]], worker: _Worker
) -> list[_TokenizedRow]:
    """Return the result of another process for a chunk; if a row is nested too deeply to pickle,
    tokenise the chunk in this process, which also reports the row's number.
    """
    try:
        return result.result()
    except RecursionError:
        return worker(chunk)


def _chunks(*sources: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    for source in sources:
        while chunk := list(islice(source, CHUNK)):
            yield chunk
