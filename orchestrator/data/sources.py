"""Where rows come from: files, folders and the hub -> rows with a prompt of their own, text or messages throughout.

The home of `datasets`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain, islice
from typing import IO, Any, Literal, NamedTuple

from orchestrator.settings.load import looks_local
from orchestrator.settings.spec import DATA_SUFFIXES, DataSpec, SourceSpec, Split, UserError

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


class Place(NamedTuple):
    """Where a pair comes from."""

    key: str  # the setting that names its set: data.train, or data.train.1 of several
    source: str
    row: int  # of the source, counted from 1

    def __str__(self) -> str:
        return f"{self.key} row {self.row}"


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
    identities = [open_source(key, source, "train")[1] for key, source in sources.items()]

    def texts() -> Iterator[str]:
        for _, row in chain.from_iterable(open_source(key, source, "train")[0] for key, source in sources.items()):
            try:
                whole = checked(row)
            except BadRow:
                continue  # tokenising the pairs is what complains, with the row's number
            for part in (whole["prompt"], whole["chosen"], whole["rejected"]):
                yield from [part] if isinstance(part, str) else (str(message.get("content") or "") for message in part)

    return texts, one_of(identities)[:24]


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
                found[before + number] = RawRow(source.path, number, checked(row))
        before += read
    return found


def first_rows(data: DataSpec, count: int) -> Iterator[tuple[Place, Any]]:
    """The first rows of each training set, as they are.

    Raises:
        UserError: a source is missing or unreadable.
    """
    for key, source in data.sources("train").items():
        check_source(key, source.path)
        for number, row in islice(open_source(key, source, "train")[0], count):
            yield Place(key, source.path, number), row


def open_source(key: str, source: SourceSpec, split: Split) -> tuple[Iterable[tuple[int, Any]], str]:
    """(row number, row) of a source, and a hash of its content."""
    identity = None
    if source.path.endswith(DATA_SUFFIXES):
        with open(source.path, "rb") as file:
            identity = hashlib.file_digest(file, "sha256").hexdigest()
    if source.path.endswith((".jsonl", ".json")):
        return _json_rows(key, source.path), str(identity)
    rows = _with_datasets(key, source, split)
    return enumerate(rows, 1), identity or rows._fingerprint  # of a single file `datasets` would hash its date too


def one_of(identities: list[str]) -> str:
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


def checked(row: Any) -> Row:
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
