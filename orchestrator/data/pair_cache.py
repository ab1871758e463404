"""Tokenise preference rows once, into a memory-mapped cache."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.build_once import build_once
from orchestrator.data.file_lock import Poll, no_poll
from orchestrator.data.pairs import COUNTED, Pairs, TokenizedSet
from orchestrator.data.row import NUMERIC, BadRow
from orchestrator.data.sources import bad_row_error, check_source, open_source
from orchestrator.data.tokenize_rows import RowResult, RowTokenizer, tokenized_rows
from orchestrator.data.tokens import TokenizedPair, tokenizer_identity
from orchestrator.settings.data import DataSpec, Split, TrainingSetSpec
from orchestrator.settings.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 6  # of the cache; increase it when the meaning of a cached number changes

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


class NoPairs(UserError):
    """Error for a source without a usable row."""


def tokenized_pairs(
    data: DataSpec,
    split: Split,
    tokenizer: "PreTrainedTokenizerBase",
    cache_dir: Path,
    name: str = "",
    first: int | None = None,
    poll: Poll = no_poll,
) -> Pairs:
    """Return the pairs of data.train or of the evaluation set with that name, from the cache, which
    is built if it does not exist. first: use only so many rows of each source.
    poll: called while rows are tokenised, here or by another process.

    Raises:
        UserError: a source is missing or unreadable, a row cannot be used, or (NoPairs) no row is
            left.
    """
    tokenizer_hash, sets = tokenizer_identity(tokenizer), list[TokenizedSet]()
    for key, source in data.sources(split, name).items():
        check_source(key, source.path)
        rows, identity = open_source(key, source, split)
        if first is not None:
            rows, identity = islice(rows, first), f"{identity} first {first}"
        folder = cache_dir / "pairs" / _digest(identity, tokenizer_hash, data)
        results = tokenized_rows(rows, RowTokenizer(tokenizer, data), poll)
        build = partial(_build, key=key, source=source.path, results=results, data=data)
        build_once(folder, build, poll)
        weight = source.weight if isinstance(source, TrainingSetSpec) else 1.0
        sets.append(TokenizedSet(key, source.path, weight, folder))
    return Pairs(sets)


def _digest(identity: str, tokenizer: str, data: DataSpec) -> str:
    key = [FORMAT, identity, tokenizer, *(getattr(data, name) for name in CACHED)]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def _build(
    folder: Path, key: str, source: str, results: Iterable[RowResult], data: DataSpec
) -> None:
    """Write the files of one data set."""
    arrays, uncut = _Arrays(data), list[tuple[int, int, int]]()
    dropped: Counter[str] = Counter()
    first_bad: dict[str, str] = {}  # by the reason for dropping rows
    for row in results:
        if row.uncut is not None:
            uncut.append(row.uncut)
        if isinstance(row.result, BadRow):
            if error := bad_row_error(key, source, row.number, row.result, data):
                raise error
            dropped[row.result.kind] += 1
            first_bad.setdefault(row.result.kind, f"row {row.number} {row.result.reason}")
        else:
            arrays.add(row, row.result)
    if not arrays.rows:
        raise _no_pair(key, source, dropped, first_bad)
    arrays.write(folder)
    np.save(folder / "uncut.npy", np.array(uncut, np.int64))
    largest_id = max(int(ids.max()) for ids in arrays.tokens)
    counts = {"dropped": dropped, **arrays.counts}
    meta = {"source": source, "largest_id": largest_id}
    meta |= {name: dict(counts[name]) for name in COUNTED}
    (folder / "meta.json").write_text(json.dumps(meta))


class _Arrays:
    """The arrays of a data set, as it is tokenised pair by pair."""

    def __init__(self, data: DataSpec) -> None:
        self.rows: list[int] = []  # their numbers
        self.lengths: list[tuple[int, int, int]] = []
        self.tokens: list[NDArray[np.int32]] = []
        self.hashes: list[bytes] = []
        self.swapped: list[bytes] = []
        numeric = [name for name, key in NUMERIC.items() if getattr(data, key) is not None]
        self.numeric: dict[str, list[float]] = {name: [] for name in numeric}
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in COUNTED[1:]}

    def add(self, row: RowResult, pair: TokenizedPair) -> None:
        """Add a usable pair and the notes about its row."""
        prompt, chosen, rejected = pair
        self.rows.append(row.number)
        self.lengths.append((len(prompt), len(chosen), len(rejected)))
        self.tokens.append(np.array(prompt + chosen + rejected, np.int32))
        self.hashes.append(content_hash(self.lengths[-1], self.tokens[-1]))
        self.swapped.append(_swapped_hash(pair))
        for name, values in (
            ("unread", row.unread),
            ("unread_columns", row.unread_columns),
            ("notes", row.notes),
        ):
            self.counts[name].update(values)
        for name, column in self.numeric.items():
            column.append(row.numbers[name])

    def write(self, folder: Path) -> None:
        """Write one file for each array."""
        np.save(folder / "tokens.npy", np.concatenate(self.tokens))
        np.save(folder / "lengths.npy", np.array(self.lengths, np.int64))
        hashes, swapped = (
            np.frombuffer(b"".join(each), "<u8").reshape(-1, 2)
            for each in (self.hashes, self.swapped)
        )
        np.save(folder / "hashes.npy", hashes)
        np.save(folder / "swapped.npy", swapped[:, 0])
        np.save(folder / "rows.npy", np.array(self.rows, np.int64))
        for name, column in self.numeric.items():
            np.save(folder / f"{name}.npy", np.array(column, np.float64))


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
