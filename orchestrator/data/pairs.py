"""Raw preference rows -> tokenized (prompt, chosen, rejected), once, in parallel, into a memory-mapped cache.

It takes no World and calls no collective: the first process to hold the lock builds the cache, the others poll for
the finished files, so that no rank waits where a time-out can kill the run.
"""

import bisect
import copy
import difflib
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from orchestrator.data.order import Integers, Share
from orchestrator.settings.load import looks_local
from orchestrator.settings.spec import (
    DATA_SUFFIXES,
    TEMPLATE_CALL,
    DataSpec,
    SourceSpec,
    Split,
    TrainingSetSpec,
    UserError,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 5  # of the cache; raise it when the meaning of a cached number changes
CHUNK = 512  # rows handed to a tokenising process at a time
PARALLEL_FROM = 4 * CHUNK  # rows below which starting processes costs more than they save

# Settings of `data` that decide what is in the cache; data.chat_template is in the tokenizer.
CACHED = (
    "max_length",
    "truncation",
    "max_prompt_length",
    "max_completion_length",
    "system_prompt",
    "chat_template_kwargs",
    "on_bad_row",
    "weight_column",
    "margin_column",
)
# Arguments of apply_chat_template that a row may give although no template reads them as variables.
NO_VARIABLES = ("chat_template", "continue_final_message", "sanitize_control_tokens")

# What pairs have besides tokens, and the setting of `data` that names its column.
NUMERIC = {"weights": "weight_column", "margins": "margin_column"}

Row = dict[str, Any]
DropReason = Literal["malformed rows", "ties", "empty completions", "prompts that fill data.max_length"]


class BadRow(Exception):
    """A row that cannot be trained on; `kind` decides whether it is dropped, `reason` says what is wrong with it, and
    `cure` what to do about it besides mending or dropping the row."""

    def __init__(self, kind: DropReason, reason: str, cure: str = "") -> None:
        super().__init__(kind, reason, cure)
        self.kind, self.reason, self.cure = kind, reason, cure
        self.row: Any = None  # as it was read


class RawRow(NamedTuple):
    """A row as its source has it."""

    source: str
    number: int  # in the source, from 1
    row: Row  # with a prompt of its own


class TokenizedPair(NamedTuple):
    """Token ids of one pair. A sequence of the model is prompt + chosen, or prompt + rejected."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class Place(NamedTuple):
    """Where a pair comes from."""

    key: str  # the setting that names its set: data.train, or data.train.1 of several
    source: str
    row: int  # of the source, counted from 1

    def __str__(self) -> str:
        return f"{self.key} row {self.row}"


class TokenizedSet(NamedTuple):
    """One data set in the cache."""

    key: str  # the setting that names it
    source: str
    weight: float  # how often its pairs are seen in an epoch
    folder: Path

    @property
    def dropped(self) -> dict[str, int]:
        """Rows left out, by reason."""
        return json.loads((self.folder / "meta.json").read_text())["dropped"]

    @property
    def unread(self) -> dict[str, int]:
        """Rows with a variable that their chat template does not read, by its name."""
        return json.loads((self.folder / "meta.json").read_text())["unread"]

    @property
    def uncut_lengths(self) -> Integers:
        """[M, 3] tokens of prompt, chosen and rejected before truncation, of every row that could be tokenised, left
        out or not."""
        return np.load(self.folder / "uncut.npy").reshape(-1, 3)


class Pairs:
    """The usable pairs of one or more data sets, memory-mapped: nothing is read until it is asked for.

    `pair_ids` [N] ascend: they are the rows of the sources, counted from 1 and on from one source to the next, whether
    they hold a usable pair or not. `lengths` [N, 3] are the tokens of prompt, chosen and rejected; `hashes` [N, 2] 128
    bits over the token ids of each; `weights` and `margins` [N] fp64 are what data.weight_column and data.margin_column
    say, if they are set; `dropped` counts the rows left out by reason, `unread` those with a variable of their own that
    the chat template does not read, by its name.
    """

    def __init__(self, sets: Sequence[TokenizedSet]) -> None:
        self.sets = list(sets)
        folders = [each.folder for each in sets]
        metas = [json.loads((folder / "meta.json").read_text()) for folder in folders]
        self.dropped, self.unread = (
            dict(sum((Counter(meta[name]) for meta in metas), Counter[str]())) for name in ("dropped", "unread")
        )
        self.largest_id: int = max(meta["largest_id"] for meta in metas)
        numbers, lengths = ([np.load(folder / f"{name}.npy") for folder in folders] for name in ("rows", "lengths"))
        rows = [len(kept) + sum(meta["dropped"].values()) for kept, meta in zip(numbers, metas, strict=True)]
        self._rows_before: list[int] = list(accumulate(rows[:-1], initial=0))
        of_sets = zip(numbers, self._rows_before, strict=True)
        self.pair_ids: Integers = _joined([kept + before for kept, before in of_sets])
        self.lengths: Integers = _joined(lengths)
        self.hashes: NDArray[np.uint64] = _joined([np.load(folder / "hashes.npy", mmap_mode="r") for folder in folders])
        kept = [name for name in NUMERIC if (folders[0] / f"{name}.npy").exists()]  # by all of them then
        numeric = {name: _joined([np.load(folder / f"{name}.npy") for folder in folders]) for name in kept}
        self.weights: NDArray[np.float64] | None = numeric.get("weights")
        self.margins: NDArray[np.float64] | None = numeric.get("margins")
        self._starts: Integers = _joined([each.sum(axis=1).cumsum() - each.sum(axis=1) for each in lengths])
        self._tokens: list[NDArray[np.int32]] = [np.load(folder / "tokens.npy", mmap_mode="r") for folder in folders]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def identity(self) -> str:
        """Hash of rows, tokenizer and truncation of all sets."""
        return _one_of([each.folder.name for each in self.sets])

    @property
    def shares(self) -> tuple[Share, ...]:
        """What each set gives to an epoch."""
        ends = [*np.searchsorted(self.pair_ids, self._rows_before[1:], side="right"), len(self)]
        of_sets = zip(np.diff(ends, prepend=0), self.sets, strict=True)
        return tuple(Share.of(int(pairs), each.weight) for pairs, each in of_sets)

    @property
    def pairs_per_epoch(self) -> int:
        """Pairs that an epoch trains on."""
        return sum(share.per_epoch for share in self.shares)

    def place(self, pair_id: int) -> Place:
        """The row that a pair was made of."""
        of = self._set_of(pair_id)
        return Place(self.sets[of].key, self.sets[of].source, int(pair_id) - self._rows_before[of])

    def only(self, indices: Integers) -> "Pairs":
        """The pairs at some indices, in the order of their rows."""
        few, kept = copy.copy(self), np.sort(indices)
        few.dropped, few.unread = {}, {}
        few.pair_ids, few.lengths, few.hashes = self.pair_ids[kept], self.lengths[kept], self.hashes[kept]
        few.weights = None if self.weights is None else self.weights[kept]
        few.margins = None if self.margins is None else self.margins[kept]
        few._starts = self._starts[kept]
        return few

    def tokens(self, index: int) -> NDArray[np.int32]:
        """Token ids of prompt, chosen and rejected of one pair, one after the other."""
        start = self._starts[index]
        return self._tokens[self._set_of(self.pair_ids[index])][start : start + self.lengths[index].sum()]

    def __getitem__(self, index: int) -> Row:
        """One pair as a collator takes it: pair_id and lists of token ids under TRL's names; weight and margin, where
        they are set."""
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
        """The token ids of each pair's prompt, 4 bytes each."""
        for pair_id, start, length in zip(self.pair_ids, self._starts, self.lengths[:, 0], strict=True):
            yield self._tokens[self._set_of(pair_id)][start : start + length].tobytes()

    def _set_of(self, pair_id: int) -> int:
        return bisect.bisect_left(self._rows_before, pair_id) - 1


def _joined(parts: list[Any]) -> Any:
    """Arrays one after the other; a single one stays what it is, memory-mapped perhaps."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def tokenized_pairs(
    data: DataSpec, split: Split, tokenizer: "PreTrainedTokenizerBase", cache_dir: Path, name: str = ""
) -> Pairs:
    """The pairs of data.train or of the evaluation set with that name, from the cache, which is built first where it
    is not there yet.

    Raises:
        UserError: a source is missing or unreadable, a row cannot be used, or no row is left.
    """
    of_tokenizer, sets = tokenizer_identity(tokenizer), list[TokenizedSet]()
    for key, source in data.sources(split, name).items():
        check_source(key, source.path)
        rows, identity = _open_source(key, source, split)
        folder = cache_dir / "pairs" / _digest(identity, of_tokenizer, data)
        build_once(folder, partial(_build, key=key, source=source.path, rows=rows, tokenizer=tokenizer, data=data))
        sets.append(
            TokenizedSet(key, source.path, source.weight if isinstance(source, TrainingSetSpec) else 1.0, folder)
        )
    return Pairs(sets)


def without_held_out(pairs: Pairs, fraction: float, seed: int) -> tuple[Pairs, Pairs]:
    """The pairs to train on, and those to evaluate instead: all pairs of some prompts, taken in the order of a hash of
    their tokens and the seed, as near to that fraction as they go.

    Raises:
        UserError: nothing would be left to train on, in one of the sets perhaps, or to evaluate.
    """
    key = str(seed).encode()
    hashes = (hashlib.blake2b(prompt, digest_size=8, key=key).digest() for prompt in pairs.prompts())
    _, prompts, sizes = np.unique(np.frombuffer(b"".join(hashes), "<u8"), return_inverse=True, return_counts=True)
    left, is_out = fraction * len(pairs), np.zeros(len(sizes), np.bool_)
    for prompt, size in enumerate(sizes.tolist()):
        if size <= left:
            is_out[prompt], left = True, left - size
    smallest = np.where(is_out, len(pairs) + 1, sizes).argmin()
    if sizes[smallest] < 2 * left:  # nearer with it than without
        is_out[smallest] = True
    held = is_out[prompts]
    train, held_out = pairs.only(np.flatnonzero(~held)), pairs.only(np.flatnonzero(held))
    train.dropped, train.unread = pairs.dropped, pairs.unread
    gone = next((each for each, share in zip(pairs.sets, train.shares, strict=True) if not share.pairs), None)
    if gone is not None or not len(held_out):
        which = f"every pair of {gone.source}" if gone else "none"
        rule = f"holds out {which}, of {len(pairs)} pairs with {len(sizes)} prompts"
        cure = "lower it, or set data.eval to a file" if gone else "raise it, or set data.eval to a file"
        raise UserError("data.eval_fraction", fraction, rule, cure)
    return train, held_out


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Make a folder by `build(partial_folder)`, by one process of all that ask; the others wait for it by polling.

    The lock dies with its holder, so a killed builder is simply replaced by the next process.
    """
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


def check_source(key: str, source: str) -> None:
    """Refuse a missing file before anything heavy is loaded."""
    if looks_local(source) and not os.path.exists(source):
        raise UserError(
            key, source, "does not exist", "give a JSONL, JSON or Parquet file, a saved dataset or a hub name"
        )


def count_rows(key: str, source: str) -> int | None:
    """Rows of a local file, without loading it; None where only `datasets` could tell."""
    if source.endswith((".jsonl", ".json")) and os.path.isfile(source):
        return sum(1 for _ in _json_rows(key, source))
    return None


def training_texts(data: DataSpec) -> tuple[Callable[[], Iterator[str]], str]:
    """Every text of the training rows, as often as asked, and a hash of them: what a tokenizer is trained on."""
    sources = data.sources("train")
    identities = [_open_source(key, source, "train")[1] for key, source in sources.items()]

    def texts() -> Iterator[str]:
        for _, row in chain.from_iterable(_open_source(key, source, "train")[0] for key, source in sources.items()):
            try:
                checked = _checked(row)
            except BadRow:
                continue  # tokenising the pairs is what complains, with the row's number
            for part in (checked["prompt"], checked["chosen"], checked["rejected"]):
                yield from [part] if isinstance(part, str) else (str(message.get("content") or "") for message in part)

    return texts, _one_of(identities)[:24]


def raw_rows(data: DataSpec, split: Split, pair_ids: Collection[int], name: str = "") -> dict[int, RawRow]:
    """The rows of which some pairs were made, by pair id; one that is no longer there, or no pair any more, is left
    out. A source is read once, and only as far as it is asked for. name: of the evaluation set.

    Raises:
        UserError: a source is missing or unreadable.
    """
    if data.eval_fraction is not None:
        split = "train"  # where the evaluation pairs are from
    found: dict[int, RawRow] = {}
    wanted, before = sorted(set(pair_ids)), 0
    for key, source in data.sources(split, name).items():
        numbers = [pair_id - before for pair_id in wanted if pair_id > before]
        if not numbers:
            break
        check_source(key, source.path)
        rows, read = _rows_at(key, source, split, numbers)
        for number, row in rows.items():
            with suppress(BadRow):
                found[before + number] = RawRow(source.path, number, _checked(row))
        before += read
    return found


def first_rows(data: DataSpec, count: int) -> Iterator[tuple[Place, Any]]:
    """The first rows of each training set, as they are.

    Raises:
        UserError: a source is missing or unreadable.
    """
    for key, source in data.sources("train").items():
        check_source(key, source.path)
        for number, row in islice(_open_source(key, source, "train")[0], count):
            yield Place(key, source.path, number), row


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of everything in a tokenizer that decides ids: vocabulary, merges, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = [state, str(tokenizer.chat_template), str(tokenizer.special_tokens_map), type(tokenizer).__name__]
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()


# --- reading -----------------------------------------------------------------------------------------------------


def _open_source(key: str, source: SourceSpec, split: Split) -> tuple[Iterable[tuple[int, Any]], str]:
    """(row number, row) of a source, and a hash of its content."""
    identity = None
    if source.path.endswith(DATA_SUFFIXES):
        with open(source.path, "rb") as file:
            identity = hashlib.file_digest(file, "sha256").hexdigest()
    if source.path.endswith((".jsonl", ".json")):
        return _json_rows(key, source.path), str(identity)
    rows = _with_datasets(key, source, split)
    return enumerate(rows, 1), identity or rows._fingerprint  # of a single file `datasets` would hash its date too


def _one_of(identities: list[str]) -> str:
    """A hash of several; of one alone, itself."""
    return identities[0] if len(identities) == 1 else hashlib.sha256(" ".join(identities).encode()).hexdigest()


def _rows_at(key: str, source: SourceSpec, split: Split, numbers: list[int]) -> tuple[dict[int, Any], int]:
    """The rows with these numbers, which ascend, of a source that has them; and how many rows it has, or were read up
    to the last of them."""
    if source.path.endswith((".jsonl", ".json")):
        found, wanted, read = dict[int, Any](), set(numbers), 0
        for read, row in islice(_json_rows(key, source.path), numbers[-1]):
            if read in wanted:
                found[read] = row
        return found, read
    rows = _with_datasets(key, source, split)
    return {number: rows[number - 1] for number in numbers if number <= len(rows)}, len(rows)


def _json_rows(key: str, source: str) -> Iterator[tuple[int, Any]]:
    """Rows of JSON lines (blank lines do not count), or of one JSON array."""
    with open(source, encoding="utf-8-sig") as file:
        try:
            if source.endswith(".json") and _first_letter(file) == "[":
                file.seek(0)
                yield from enumerate(json.load(file), 1)
                return
            file.seek(0)
            for number, line in enumerate((line for line in file if line.strip()), 1):
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{key} row {number}",
                        line.strip(),
                        f"is not JSON ({error.msg}, column {error.colno})",
                        f"mend that line of {source}",
                    ) from None
        except json.JSONDecodeError as error:
            raise UserError(key, source, f"is not JSON ({error})", "mend it, or write one object per line") from None
        except UnicodeDecodeError as error:
            raise UserError(key, source, f"is not UTF-8 text ({error.reason})", "convert the file to UTF-8") from None


def _first_letter(file: IO[str]) -> str:
    while (letter := file.read(1)).isspace():
        pass
    return letter


def _with_datasets(key: str, source: SourceSpec, split: Split) -> Any:
    """A datasets.Dataset from Parquet, from a folder written by save_to_disk or of several files, or from the hub."""
    import datasets

    datasets.disable_progress_bars()
    path, name, part = source.path, source.name, source.split or ("train" if split == "train" else "test")
    try:
        if path.endswith(".parquet"):
            return datasets.Dataset.from_parquet(path)
        if os.path.isdir(path) and any(
            os.path.exists(os.path.join(path, file)) for file in ("state.json", "dataset_dict.json")
        ):
            loaded = datasets.load_from_disk(path)
            if isinstance(loaded, datasets.DatasetDict):
                return loaded[part]
            if source.split:
                raise ValueError("it is one data set, without splits")
            return loaded
        return datasets.load_dataset(path, name, split=part)
    except Exception as error:  # datasets raises a dozen types here; all mean that the source cannot be read
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            key,
            path,
            f"cannot be read by `datasets` ({type(error).__name__}: {reason})",
            f"give a file, a folder written by save_to_disk (./{path}), or a hub name that this machine can reach",
        ) from None


# --- the shape of a row ------------------------------------------------------------------------------------------


def _checked(row: Any) -> Row:
    """The row with an explicit prompt, strings or messages throughout; BadRow when its shape is wrong."""
    if not isinstance(row, Mapping):
        raise BadRow("malformed rows", f"is a {type(row).__name__}, not an object with chosen and rejected")
    for column in ("chosen", "rejected"):
        if row.get(column) is None:
            raise BadRow("malformed rows", f"has no column {column!r}; its columns are {', '.join(map(repr, row))}")
    row = dict(row) if row.get("prompt") is not None else _with_implicit_prompt(dict(row))
    kinds = {column: _kind(column, row[column]) for column in ("prompt", "chosen", "rejected")}
    if len(set(kinds.values())) > 1:
        raise BadRow("malformed rows", "mixes text and messages: " + ", ".join(f"{c} is {k}" for c, k in kinds.items()))
    return row


def _kind(column: str, value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        raise BadRow("malformed rows", f"{column} is {type(value).__name__}, neither text nor a list of messages")
    for number, message in enumerate(value, 1):
        if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
            raise BadRow("malformed rows", f"message {number} of {column} has no role")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise BadRow("malformed rows", f"message {number} of {column} has no text in its content")
    if column == "prompt" and not value:
        raise BadRow("malformed rows", "prompt is an empty list of messages")
    return "messages"


def _with_implicit_prompt(row: Row) -> Row:
    """The longest common beginning of chosen and rejected becomes the prompt, as in TRL's extract_prompt.

    Where one side is the beginning of the other, TRL leaves the last common element to the completions; so do we.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        raise BadRow("malformed rows", f"chosen is {type(chosen).__name__} and rejected {type(rejected).__name__}")
    shorter = min(len(chosen), len(rejected))
    cut = next((i for i in range(shorter) if chosen[i] != rejected[i]), max(shorter - 1, 0))
    if cut and chosen[cut] != rejected[cut] and chosen[cut - 1] == " ":
        cut -= 1  # a space belongs to the word that follows it
    return {**row, "prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


def printable(text: str, keep: str = "") -> str:
    """A text with its control characters written out, but those to keep."""
    shown = (each if each.isprintable() or each in keep else each.encode("unicode_escape").decode() for each in text)
    return "".join(shown)


def in_one_line(text: str, longest: int = 110) -> str:
    """A text for a line of a terminal, its middle left out where it is longer."""
    line = printable(text)
    return line if len(line) <= longest else f"{line[: longest // 2]} ... {line[-longest // 2 :]}"


# --- tokenising --------------------------------------------------------------------------------------------------


def tokenize_pair(row: Row, tokenizer: "PreTrainedTokenizerBase", data: DataSpec) -> tuple[TokenizedPair, list[int]]:
    """Token ids exactly as TRL 1.16 makes them: EOS on plain text only, completion from where the ids diverge.

    Also returns the last tokens of the prompt alone that neither sequence has, because they merge with the
    completion's first, or because the template renders a prompt otherwise where an answer follows.

    Raises:
        BadRow: the row is malformed.
        UserError: the chat template does not fit the settings.
    """
    row = _checked(row)
    if isinstance(row["prompt"], list):
        prompt, chosen, rejected = _conversations(row, tokenizer, data)
    else:
        for key in ("system_prompt", "chat_template_kwargs"):
            if getattr(data, key):
                raise BadRow("malformed rows", f"is plain text, on which data.{key} does not act", f"remove data.{key}")
        eos = str(tokenizer.eos_token)
        ends = [text if text.endswith(eos) else text + eos for text in (row["chosen"], row["rejected"])]
        prompt, chosen, rejected = (
            tokenizer(text=text)["input_ids"] for text in (row["prompt"], *(row["prompt"] + end for end in ends))
        )
    start = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
    return TokenizedPair(prompt[:start], chosen[start:], rejected[start:]), prompt[start:]


def truncated(pair: TokenizedPair, data: DataSpec) -> TokenizedPair:
    """What the settings leave of a pair: the prompt's end, the completions' start, and then max_length of both.

    keep_end is left to the collator: the prompts of the two sides would differ.

    Raises:
        BadRow: nothing is left to learn.
    """
    prompt = pair.prompt_ids[-data.max_prompt_length :] if data.max_prompt_length else pair.prompt_ids
    room = data.max_completion_length
    if data.truncation == "keep_start" and data.max_length is not None:
        left = data.max_length - len(prompt)
        if left <= 0:
            raise BadRow(
                "prompts that fill data.max_length",
                f"its prompt alone has {len(prompt)} tokens, data.max_length is {data.max_length}",
            )
        room = min(left, room or left)
    pair = TokenizedPair(prompt, pair.chosen_ids[:room], pair.rejected_ids[:room])
    if not pair.chosen_ids or not pair.rejected_ids:
        raise BadRow("empty completions", f"{'chosen' if not pair.chosen_ids else 'rejected'} has no token of its own")
    if pair.chosen_ids == pair.rejected_ids:
        raise BadRow("ties", "chosen equals rejected")
    return pair


def _conversations(row: Row, tokenizer: "PreTrainedTokenizerBase", data: DataSpec) -> Iterator[list[int]]:
    """Token ids of the prompt, which an answer is to follow, and of the prompt with each of the two answers."""
    prompt, arguments = row["prompt"], _template_arguments(row, data)
    if data.system_prompt and not any(message["role"] in ("system", "developer") for message in prompt):
        prompt = [{"role": "system", "content": data.system_prompt}, *prompt]
    try:
        template = tokenizer.get_chat_template(arguments.get("chat_template"), arguments["tools"])
    except ValueError:
        raise UserError(
            "model.tokenizer",
            tokenizer.name_or_path,
            "has no chat template"
            + (" that is the default" if tokenizer.chat_template else "")
            + ", but the data are conversations",
            "set data.chat_template, take an instruct model's tokenizer, or give the rows as plain text",
        ) from None
    _check_settings_read(template, data)
    if arguments["tools"] and "tools" not in _words(template):
        # what the answers rest on would be missing; of a row's own variables no letter is: see unread_variables
        raise BadRow(
            "malformed rows", "has tools, not read by the chat template", "set data.chat_template to one that does"
        )
    yield _chat(tokenizer, data, prompt, add_generation_prompt=True, **arguments)
    for side in ("chosen", "rejected"):
        yield _chat(tokenizer, data, prompt + row[side], **arguments)


def _template_arguments(row: Row, data: DataSpec) -> Row:
    """Keyword arguments of the chat template: those of all rows, and over them a row's tools (a list, or JSON of one)
    and its own."""
    tools, own = row.get("tools"), row.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise BadRow("malformed rows", f"tools is not JSON ({error.msg})") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise BadRow("malformed rows", "tools is not a list of objects, or JSON of one")
    if not isinstance(own, Mapping):
        raise BadRow("malformed rows", f"chat_template_kwargs is {type(own).__name__}, not an object")
    if taken := own.keys() & set(TEMPLATE_CALL):
        raise BadRow("malformed rows", f"chat_template_kwargs has {min(taken)!r}, which is no variable of a template")
    # Arrow gives every row the keys of all, as null: they take nothing from the settings
    said = {key: value for key, value in {"tools": tools, **own}.items() if value is not None}
    return {"tools": None, **own, **data.chat_template_kwargs, **said}


def _check_settings_read(template: str, data: DataSpec) -> None:
    """Refuse a variable of the settings that the template would leave out in silence, misspelt perhaps."""
    for name, value in data.chat_template_kwargs.items():
        if value not in (None, []) and not _reads(template, name):
            near = _nearest(template, name)
            cure = f"did you mean {near}?" if near else "remove it, or set data.chat_template to one that does"
            raise UserError(f"data.chat_template_kwargs.{name}", value, "is not read by the chat template", cure)


def unread_variables(row: Row, tokenizer: "PreTrainedTokenizerBase", data: DataSpec) -> list[str]:
    """Names of a conversation's own chat_template_kwargs that its chat template does not read, with the nearest that it
    does. It trains without them, as in TRL: one set of rows may be meant for several models' templates."""
    if not row.get("chat_template_kwargs") or isinstance(row["chosen"], str):
        return []
    arguments = _template_arguments(row, data)
    template = tokenizer.get_chat_template(arguments.get("chat_template"), arguments["tools"])
    own = (name for name, value in row["chat_template_kwargs"].items() if value is not None)
    unread = [name for name in own if not _reads(template, name)]
    return [f"{name} (it reads {near})" if (near := _nearest(template, name)) else name for name in unread]


def _reads(template: str, name: str) -> bool:
    return name in NO_VARIABLES or name in _words(template)


def _nearest(template: str, name: str) -> str | None:
    return next(iter(difflib.get_close_matches(name, _words(template), n=1)), None)


@lru_cache
def _words(template: str) -> frozenset[str]:
    """Every name that a template could read a variable by, and more."""
    return frozenset(re.findall(r"\w+", template))


def _chat(tokenizer: "PreTrainedTokenizerBase", data: DataSpec, messages: list[Row], **options: Any) -> list[int]:
    from jinja2 import TemplateSyntaxError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]  # pyright: ignore
    except TemplateSyntaxError as error:
        key, value = "data.chat_template", data.chat_template
        if value is None:
            key, value = "model.tokenizer", tokenizer.name_or_path
        rule = f"has a chat template that is not Jinja: {error.message} (line {error.lineno})"
        raise UserError(key, value, rule, "mend that line") from None
    except Exception as error:  # a template raises what it likes (roles must alternate, ...)
        raise BadRow("malformed rows", f"the chat template refuses it: {' '.join(str(error).split())}") from None


def common_prefix(left: ArrayLike, right: ArrayLike) -> int:
    """How many token ids two sequences begin with in common."""
    left, right = np.asarray(left), np.asarray(right)
    shorter = min(len(left), len(right))
    differs = left[:shorter] != right[:shorter]
    return int(differs.argmax()) if differs.any() else shorter


# --- building the cache ------------------------------------------------------------------------------------------


def _digest(identity: str, tokenizer: str, data: DataSpec) -> str:
    key = [FORMAT, identity, tokenizer, *(getattr(data, name) for name in CACHED)]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


class _TokenizedRow(NamedTuple):
    number: int
    result: TokenizedPair | BadRow
    uncut: tuple[int, int, int] | None  # tokens of prompt, chosen and rejected before truncation, if it has any
    numbers: dict[str, float] = {}  # by the names of NUMERIC
    unread: list[str] = []  # variables that the chat template does not read


class _Worker(NamedTuple):
    """Tokenises chunks of rows; picklable, so that it can be sent to another process."""

    tokenizer: "PreTrainedTokenizerBase"
    data: DataSpec

    def __call__(self, chunk: list[tuple[int, Any]]) -> list[_TokenizedRow]:
        return [self._tokenized(number, row) for number, row in chunk]

    def _tokenized(self, number: int, row: Any) -> _TokenizedRow:
        uncut = None
        try:
            whole, _ = tokenize_pair(row, self.tokenizer, self.data)
            uncut = len(whole.prompt_ids), len(whole.chosen_ids), len(whole.rejected_ids)
            unread = unread_variables(row, self.tokenizer, self.data)
            return _TokenizedRow(number, truncated(whole, self.data), uncut, _numbers(row, self.data), unread)
        except BadRow as bad:
            bad.row = row
            return _TokenizedRow(number, bad, uncut)


def _numbers(row: Row, data: DataSpec) -> dict[str, float]:
    """Weight and margin of a pair, if they are wanted, by the names of NUMERIC."""
    found: dict[str, float] = {}
    for name, setting in NUMERIC.items():
        if (column := getattr(data, setting)) is None:
            continue
        if column not in row:
            columns = ", ".join(map(repr, row))
            raise BadRow("malformed rows", f"has no column {column!r} (data.{setting}); its columns are {columns}")
        value: Any = row[column]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= sys.float_info.max or (name == "weights" and value <= 0):
            wanted = "a finite number" + " more than 0" * (name == "weights")
            raise BadRow("malformed rows", f"{column} is {value!r}, not {wanted} (data.{setting})")
        found[name] = float(value)
    return found


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
    numeric: dict[str, list[float]] = {name: [] for name, key in NUMERIC.items() if getattr(data, key) is not None}
    dropped, unread = Counter[str](), Counter[str]()
    for number, result, uncut, of_pair, unread_here in _tokenized(rows, _Worker(tokenizer, data)):
        if uncut is not None:
            uncut_lengths.append(uncut)
        if isinstance(result, BadRow):
            is_error = result.kind == "malformed rows" if data.on_bad_row is None else data.on_bad_row == "error"
            if is_error:
                mend = f"mend that row of {source}, or set data.on_bad_row=drop to leave such rows out"
                cure = f"{result.cure}, or {mend}" if result.cure else mend
                raise UserError(f"{key} row {number}", result.row, result.reason, cure)
            dropped[result.kind] += 1
            continue
        numbers.append(number)
        lengths.append((len(result.prompt_ids), len(result.chosen_ids), len(result.rejected_ids)))
        tokens.append(np.array(result.prompt_ids + result.chosen_ids + result.rejected_ids, np.int32))
        hashes.append(content_hash(lengths[-1], tokens[-1]))
        unread.update(unread_here)
        for name, column in numeric.items():
            column.append(of_pair[name])
    if not numbers:
        counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "it has no rows"
        too_long = "prompts that fill data.max_length" in dropped
        cure = "raise data.max_length" if too_long else "check that its chosen and rejected differ"
        raise UserError(
            key, source, f"leaves no pair to train on ({counts})", cure if dropped else "give a file with rows"
        )
    np.save(folder / "tokens.npy", np.concatenate(tokens))
    np.save(folder / "lengths.npy", np.array(lengths, np.int64))
    np.save(folder / "uncut.npy", np.array(uncut_lengths, np.int64))
    np.save(folder / "hashes.npy", np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 2))
    np.save(folder / "rows.npy", np.array(numbers, np.int64))
    for name, column in numeric.items():
        np.save(folder / f"{name}.npy", np.array(column, np.float64))
    largest_id = max(int(ids.max()) for ids in tokens)
    meta = {"source": source, "dropped": dict(dropped), "unread": dict(unread), "largest_id": largest_id}
    (folder / "meta.json").write_text(json.dumps(meta))


def content_hash(lengths: Iterable[int], tokens: NDArray[np.int32]) -> bytes:
    """128 bits over the token ids of a pair and the lengths [3] of its prompt, chosen and rejected."""
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
        waiting = [pool.submit(worker, chunk) for chunk in islice(chunks, 2 * processes)]
        while waiting:  # a bounded window: the file is never in memory as a whole
            yield from waiting.pop(0).result()
            waiting += [pool.submit(worker, chunk) for chunk in islice(chunks, 1)]


def _chunks(*sources: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    for source in sources:
        while chunk := list(islice(source, CHUNK)):
            yield chunk
