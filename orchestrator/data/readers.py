"""Read and count the rows of one local JSON, CSV, Parquet or Arrow file."""

import bz2
import csv
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from itertools import chain
from typing import IO, Any

from orchestrator.data.row import CONTEXT, PAIR
from orchestrator.settings.data import COMPRESSIONS, DATA_SUFFIXES, TEXT_SUFFIXES
from orchestrator.settings.errors import UserError, message_of

LARGEST_CELL = 2**31 - 1  # bytes; the default limit of the csv module is 128 kB
BLANK = " \t\r\n"
_DECODER = json.JSONDecoder()


def is_text_file(path: str) -> bool:
    """Return whether a file is JSON or CSV by its name, compressed or not."""
    return path.endswith(tuple(kind + packed for kind in TEXT_SUFFIXES for packed in COMPRESSIONS))


def is_data_file(path: str) -> bool:
    """Return whether a file is in a format that can be read, by its name."""
    return path.endswith(DATA_SUFFIXES)


def text_rows(key: str, path: str) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, row) of a JSON or CSV file.

    Raises:
        UserError: the file or a row of it cannot be read.
    """
    kind = _without_compression(path).rpartition(".")[2]
    with _reported(key, path):
        if kind in ("csv", "tsv"):
            yield from _csv_rows(key, path, "," if kind == "csv" else "\t")
        else:
            yield from _json_rows(key, path)


def rows_in_file(key: str, path: str) -> int:
    """Count the rows of a file; for Parquet and Arrow from its metadata.

    Raises:
        UserError: the file cannot be read.
    """
    if is_text_file(path):
        return sum(1 for _ in text_rows(key, path))
    with _reported(key, path):
        if path.endswith(".parquet"):
            import pyarrow.parquet as pq

            return pq.read_metadata(path).num_rows
        return arrow_table(path).num_rows


def arrow_table(path: str) -> Any:
    """Return the memory-mapped table of an Arrow file, in the stream or in the file format."""
    import pyarrow as pa

    with suppress(pa.ArrowInvalid):
        return pa.ipc.open_file(pa.memory_map(path)).read_all()
    return pa.ipc.open_stream(pa.memory_map(path)).read_all()


def _without_compression(path: str) -> str:
    ending = next((packed for packed in COMPRESSIONS if packed and path.endswith(packed)), "")
    return path.removesuffix(ending)


@contextmanager
def _reported(key: str, path: str) -> Iterator[None]:
    """Convert exceptions of reading a file to UserError."""
    import pyarrow as pa

    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            key, path, f"is not UTF-8 text ({error.reason})", "convert the file to UTF-8"
        ) from None
    except (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, OSError) as error:
        reason = getattr(error, "strerror", None) or message_of(error)
        cure = "check that it is complete, and that its suffix is right"
        raise UserError(key, path, f"cannot be read ({reason})", cure) from None


def _open_text(path: str) -> IO[str]:
    openers: dict[str, Callable[[str], Any]] = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
        ".zst": _open_zstd,
    }
    opened = openers.get(os.path.splitext(path)[1], _open_plain)(path)
    return TextIOWrapper(opened, encoding="utf-8-sig", newline="")


def _open_plain(path: str) -> IO[bytes]:
    return open(path, "rb")


def _open_zstd(path: str) -> Any:
    import pyarrow as pa

    return pa.input_stream(path, compression="zstd")


# --- CSV ------------------------------------------------------------------------------------------


def _csv_rows(key: str, path: str, delimiter: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(LARGEST_CELL)
    with _open_text(path) as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        number = 0
        try:
            for number, row in enumerate(reader, 1):
                if None in row:
                    rule = "has more cells than the header"
                    cure = f"quote cells that hold {delimiter!r}"
                    raise UserError(f"{key} row {number}", row[None], rule, cure)
                yield number, {name: _cell(name, text) for name, text in row.items()}
        except csv.Error as error:
            raise UserError(
                f"{key} row {number + 1}", path, f"is not CSV ({error})", "fix that row"
            ) from None


def _cell(name: str, text: str | None) -> Any:
    """Return a cell's value: a number if it is one and the column is not text; None if the cell is
    missing.
    """
    if text and name not in (*PAIR, *CONTEXT):
        with suppress(ValueError):
            return float(text)
    return text


# --- JSON -----------------------------------------------------------------------------------------


def _json_rows(key: str, path: str) -> Iterator[tuple[int, Any]]:
    """Yield rows of JSON lines (blank lines are not counted) or of one JSON array, whatever the
    file's name.
    """
    with _open_text(path) as file:
        begin = ""
        for begin in file:
            if begin.strip():
                break
        lines = chain([begin], file)
        if begin.lstrip(BLANK).startswith("["):
            yield from _array_rows(key, path, "".join(lines))
            return
        for number, line in enumerate((line for line in lines if line.strip()), 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if number == 1 and not path.endswith("l"):
                    yield from _one_object(key, path, line + "".join(lines))
                    return
                raise _not_json(
                    f"{key} row {number}", line.strip(), error, f"fix that line of {path}"
                ) from None
            yield number, row


def _array_rows(key: str, path: str, text: str) -> Iterator[tuple[int, Any]]:
    place, number = _skip_blanks(text, text.index("[") + 1), 0
    is_more = text[place : place + 1] != "]"
    while is_more:
        number += 1
        try:
            row, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise _not_json(
                f"{key} row {number}", text[place:], error, f"fix that row of {path}"
            ) from None
        yield number, row
        place = _skip_blanks(text, place)
        is_more = text[place : place + 1] == ","
        if is_more:
            place = _skip_blanks(text, place + 1)
    if place == len(text):
        rule = f"is not JSON: the array ends after row {number} without a bracket"
        raise UserError(key, path, rule, "fix it, or write one object per line")
    if text[place] != "]":
        rule = (
            "is not JSON: after that row neither a comma and another row nor the end of the "
            "array follows"
        )
        raise UserError(f"{key} row {number}", text[place:], rule, f"fix what follows it in {path}")
    if rest := text[place + 1 :].strip():
        raise UserError(key, rest, "follows the end of the JSON array", f"remove it from {path}")


def _one_object(key: str, path: str, text: str) -> Iterator[tuple[int, Any]]:
    """Yield the only row of a file that contains one object over several lines."""
    try:
        yield 1, json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(key, path, error, "fix it, or write one object per line") from None


def _not_json(key: str, value: str, error: Exception, cure: str) -> UserError:
    where, reason = "", getattr(error, "msg", str(error))
    if isinstance(error, json.JSONDecodeError):
        where = f", line {error.lineno}, column {error.colno}"
    if isinstance(error, RecursionError):
        reason = "it is nested too deeply"
    return UserError(key, value, f"is not JSON ({reason}{where})", cure)


def _skip_blanks(text: str, place: int) -> int:
    while place < len(text) and text[place] in BLANK:
        place += 1
    return place
