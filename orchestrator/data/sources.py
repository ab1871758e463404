"""Open data sources (files, folders and the hub) and check their rows.

The only module that imports `datasets`.
"""

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from orchestrator.data.files import check_no_lfs_pointer
from orchestrator.data.messages import without_nulls
from orchestrator.data.readers import (
    arrow_table,
    is_data_file,
    is_text_file,
    rows_in_file,
    text_rows,
)
from orchestrator.data.row import BadRow, Row, printable
from orchestrator.data.shapes import checked, numbers_of
from orchestrator.durable import sha256_of
from orchestrator.settings.data import DATA_SUFFIXES, DataSpec, SourceSpec, Split
from orchestrator.settings.errors import UserError, type_and_message
from orchestrator.settings.load import looks_local, scheme_of
from orchestrator.settings.os_errors import os_errors

READABLE = (
    "use a JSONL, JSON, CSV, Parquet or Arrow file, a folder of such files, a saved "
    "dataset or a hub name"
)
SAVED = ("state.json", "dataset_dict.json")  # a folder written by save_to_disk contains one of them
HUB = re.compile(r"(?:hf://|https://huggingface\.co/)datasets/([\w.-]+/[\w.-]+)")
UNKNOWN_SPLIT = re.compile(r"Unknown split .*Should be one of \[(.*?)\]")


class RawRow(NamedTuple):
    """A row and its place in the source."""

    source: str
    number: int  # in the source, from 1
    row: Row  # with an explicit prompt


class Place(NamedTuple):
    """Location of a pair in its source."""

    key: str  # the setting of its data set: data.train, or data.train.1 of several
    source: str
    row: int  # in the source, counted from 1

    def __str__(self) -> str:
        return f"{self.key} row {self.row}"


class SourceRows(NamedTuple):
    """Statistics of a source's rows that need no tokenizer."""

    key: str  # the setting that names the source
    source: str
    rows: int
    malformed: int  # rows that data.on_bad_row=drop drops
    unread: dict[str, int]  # rows with a value, by column that is not read
    notes: dict[str, int]  # rows by a note of data/shapes.py


def check_source(key: str, source: str) -> None:
    """Check that a source can be read, before anything heavy is loaded.

    Raises:
        UserError: it is missing, empty, in an unsupported format, or a URL.
    """
    if scheme := scheme_of(source):
        hub = HUB.match(source)
        local = f"remove file://: {source.removeprefix('file://')}"
        copy = "copy it to a disk that every node can read, and use its path"
        cure = f"write {hub[1]}" if hub else local if scheme == "file" else copy
        raise UserError(key, source, f"{scheme}:// is not supported", cure)
    if not looks_local(source):
        return
    if not os.path.exists(source):
        raise UserError(key, source, "does not exist", _cure_of_missing(source))
    with os_errors({key: source}, key):
        files = [source] if not os.path.isdir(source) else _files_below(key, source)
        for file in files:
            _check_file(key, source, file)


def count_rows(key: str, source: SourceSpec, split: Split) -> int | None:
    """Return the number of rows of a local source; None for a hub name, which would have to be
    loaded.

    Raises:
        UserError: the source cannot be read.
    """
    if not looks_local(source.path):
        return None
    check_source(key, source.path)
    if os.path.isdir(source.path):
        return len(_with_datasets(key, source, split))
    return rows_in_file(key, source.path)


def check_rows(data: DataSpec, split: Split, name: str = "") -> list[SourceRows]:
    """Check all rows of the local sources of a split, as tokenising does, but without a tokenizer.

    name: the evaluation set. Hub names are skipped.

    Raises:
        UserError: a source cannot be read, or a row is unusable and is not dropped.
    """
    sources = {
        key: source for key, source in data.sources(split, name).items() if looks_local(source.path)
    }
    return [_check_rows_of(key, source, split, data) for key, source in sources.items()]


def bad_row_error(
    key: str, source: str, number: int, bad: BadRow, data: DataSpec
) -> UserError | None:
    """Return the error for an unusable row; None if it is dropped and counted instead."""
    is_error = (
        bad.kind == "malformed rows" if data.on_bad_row is None else data.on_bad_row == "error"
    )
    if not is_error:
        return None
    fix = f"fix that row of {source}, or set data.on_bad_row=drop to drop such rows"
    # if the first row is wrong, all rows probably have the wrong shape
    cure = fix if not bad.cure else bad.cure if number == 1 else f"{bad.cure}, or {fix}"
    return UserError(f"{key} row {number}", bad.row, bad.reason, cure)


def _check_rows_of(key: str, source: SourceSpec, split: Split, data: DataSpec) -> SourceRows:
    check_source(key, source.path)
    rows, malformed, unread, notes = 0, 0, Counter[str](), Counter[str]()
    for number, row in open_source(key, source, split)[0]:
        rows += 1
        try:
            result = checked(row, data)
            # ties are dropped, so their numbers are not checked
            if result.row["chosen"] != result.row["rejected"]:
                numbers_of(result.row, data)
        except BadRow as bad:
            bad.row = row
            if error := bad_row_error(key, source.path, number, bad, data):
                raise error from None
            malformed += 1
            continue
        unread.update(result.unread)
        notes.update(result.notes)
    return SourceRows(key, source.path, rows, malformed, dict(unread), dict(notes))


def _files_below(key: str, folder: str) -> list[str]:
    """Return the data files of a folder, or raise an error that names the files it contains
    instead.
    """

    def fail(error: OSError) -> NoReturn:  # os.walk would leave out a folder that it cannot read
        raise error

    walk = os.walk(folder, onerror=fail)
    files = [os.path.join(place, name) for place, _, names in walk for name in sorted(names)]
    if not files:
        raise UserError(key, folder, "is a folder without files", READABLE)
    if any(os.path.exists(os.path.join(folder, name)) for name in SAVED):
        return [file for file in files if file.endswith(".arrow")]
    if not (data := [file for file in files if is_data_file(file)]):
        names = ", ".join(os.path.relpath(file, folder) for file in files[:3]) + ", ..." * (
            len(files) > 3
        )
        raise UserError(
            key, folder, f"is a folder without data files (it contains {names})", READABLE
        )
    return data


def _check_file(key: str, source: str, file: str) -> None:
    is_alone = file == source
    name = "it" if is_alone else os.path.relpath(file, source)
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(
            key, source, f"{name} is not a regular file (a pipe, a socket or a device)", READABLE
        )
    if not os.access(file, os.R_OK):
        raise UserError(
            key, source, f"{name} is not readable by this user", "change its permissions"
        )
    if not status.st_size and is_alone:
        raise UserError(
            key,
            source,
            "leaves no pair to train on (it has no rows: the file is empty)",
            "use a file with rows",
        )
    check_no_lfs_pointer(key, source, file)
    if is_alone and not is_data_file(file):
        ending = "".join(Path(file).suffixes[-2:])
        rule = "is a file without a suffix, so its format is unknown"
        if ending:
            rule = f"is a {ending} file, which cannot be read"
        raise UserError(
            key,
            source,
            rule,
            f"convert it to JSONL or Parquet; supported are {', '.join(DATA_SUFFIXES)}",
        )


def _cure_of_missing(source: str) -> str:
    if any(letter in source for letter in "*?["):
        return "patterns are not expanded: use the folder of the files, or a list of files"
    return READABLE


def training_texts(data: DataSpec) -> tuple[Callable[[], Iterator[str]], str]:
    """Return a function that iterates over all training texts (to train a tokenizer), and a hash of
    them.
    """
    sources = data.sources("train")
    identities = [open_source(key, source, "train")[1] for key, source in sources.items()]

    def texts() -> Iterator[str]:
        for _, row in chain.from_iterable(
            open_source(key, source, "train")[0] for key, source in sources.items()
        ):
            try:
                whole = checked(row, data).row
            except BadRow:
                continue  # tokenising the pairs reports it, with the row's number
            for part in (whole["prompt"], whole["chosen"], whole["rejected"]):
                yield from (
                    [part]
                    if isinstance(part, str)
                    else (str(message.get("content") or "") for message in part)
                )

    return texts, one_of(identities)[:24]


def raw_rows(
    data: DataSpec, split: Split, pair_ids: Collection[int], name: str = ""
) -> dict[int, RawRow]:
    """Return the rows of some pairs, by pair id; rows that no longer exist or are no longer usable
    are left out.

    Each source is read once, and only as far as needed. name: the evaluation set.

    Raises:
        UserError: a source is missing or unreadable.
    """
    if data.eval_fraction is not None:
        split = "train"  # the evaluation pairs are held out from it
    raw: dict[int, RawRow] = {}
    ascending, before = sorted(set(pair_ids)), 0
    for key, source in data.sources(split, name).items():
        numbers = [pair_id - before for pair_id in ascending if pair_id > before]
        if not numbers:
            break
        check_source(key, source.path)
        rows, read = _rows_at(key, source, split, numbers)
        for number, row in rows.items():
            with suppress(BadRow):
                raw[before + number] = RawRow(source.path, number, checked(row, data).row)
        before += read
    return raw


def first_rows(data: DataSpec, count: int) -> Iterator[tuple[Place, Any]]:
    """Yield the first rows of each training set, unchanged.

    Raises:
        UserError: a source is missing or unreadable.
    """
    for key, source in data.sources("train").items():
        check_source(key, source.path)
        for number, row in islice(open_source(key, source, "train")[0], count):
            yield Place(key, source.path, number), row


def open_source(
    key: str, source: SourceSpec, split: Split
) -> tuple[Iterable[tuple[int, Any]], str]:
    """Return an iterable of (row number, row) of a source, and a hash of its content."""
    identity = None
    if os.path.isfile(source.path):
        identity = sha256_of(Path(source.path))
    if is_text_file(source.path):
        return text_rows(key, source.path), str(identity)
    rows = _with_datasets(key, source, split)
    # for a single file, `datasets` would also hash its date
    return enumerate(map(_as_written, rows), 1), identity or rows._fingerprint


def one_of(identities: list[str]) -> str:
    """Return the only identity, or a hash of several."""
    if len(identities) == 1:
        return identities[0]
    return hashlib.sha256(" ".join(identities).encode()).hexdigest()


def _rows_at(
    key: str, source: SourceSpec, split: Split, numbers: list[int]
) -> tuple[dict[int, Any], int]:
    """Return the rows with these ascending numbers, and the number of rows in the source or read up
    to the last.
    """
    if is_text_file(source.path):
        rows_at, needed, read = dict[int, Any](), set(numbers), 0
        for read, row in islice(text_rows(key, source.path), numbers[-1]):
            if read in needed:
                rows_at[read] = row
        return rows_at, read
    rows = _with_datasets(key, source, split)
    return {
        number: _as_written(rows[number - 1]) for number in numbers if number <= len(rows)
    }, len(rows)


def _as_written(row: Row) -> Row:
    """Return an Arrow row without nulls inside its values: Arrow adds the keys of all objects to
    each.
    """
    return {column: without_nulls(value) for column, value in row.items()}


def _with_datasets(key: str, source: SourceSpec, split: Split) -> Any:
    """Return a datasets.Dataset from Parquet, Arrow, a folder (of save_to_disk, or of files) or the
    hub.
    """
    import datasets

    datasets.disable_progress_bars()
    path, name = source.path, source.name
    part = source.split or ("train" if split == "train" else "test")
    try:
        if path.endswith(".parquet"):
            return datasets.Dataset.from_parquet(path)
        if path.endswith(".arrow"):
            return datasets.Dataset(arrow_table(path))
        if os.path.isdir(path) and any(os.path.exists(os.path.join(path, file)) for file in SAVED):
            loaded = datasets.load_from_disk(path)
            if isinstance(loaded, datasets.DatasetDict):
                if part not in loaded:
                    _refuse_split(key, path, part, list(map(str, loaded)))
                return loaded[part]
            if source.split:
                raise UserError(
                    f"{key}.split", part, f"{path} is a single data set without splits", "remove it"
                )
            return loaded
        return datasets.load_dataset(path, name, split=part)
    except UserError:
        raise
    # datasets raises a dozen types; all mean that the source cannot be read
    except Exception as error:
        if splits := UNKNOWN_SPLIT.search(str(error)):
            _refuse_split(key, path, part, re.findall(r"[\w.-]+", splits[1]))
        cure = "use a path, or a hub name that can be reached"
        if os.path.exists(path):
            cure = "check that it is complete"
        raise UserError(
            key, path, f"cannot be read by `datasets` ({type_and_message(error)})", cure
        ) from None


def _refuse_split(key: str, path: str, part: str, splits: list[str]) -> NoReturn:
    cure = f"use one of them: {key}={{path: {path}, split: {splits[0]}}}"
    raise UserError(key, path, f"has no split {part!r}; its splits are {', '.join(splits)}", cure)


def in_one_line(text: str, longest: int = 110) -> str:
    """Return a text as one printable line, with its middle replaced by ... if it is too long."""
    line = printable(text)
    return line if len(line) <= longest else f"{line[: longest // 2]} ... {line[-longest // 2 :]}"
