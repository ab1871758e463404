"""Rows of one file: JSON and CSV, compressed or not; what is wrong in a file is named with
its row.
"""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from orchestrator.data.readers import rows_in_file, text_rows
from orchestrator.settings.errors import UserError
from support.tiny_parts import TEXT_ROW

ROWS = [TEXT_ROW, {"prompt": 'a "b",\nc', "chosen": "", "rejected": "ü"}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'prompt,chosen,rejected\nSay it., yes, no\n"a ""b"",\nc",,ü\n'
COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content[:9]) + gzip.compress(content[9:]),  # of two parts
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}


def rows_of(path: Path) -> list[Any]:
    return [row for _, row in text_rows("data.train", str(path))]


@pytest.mark.parametrize("packed", COMPRESSED)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", JSONL),
        ("a.ndjson", JSONL),
        ("a.json", json.dumps(ROWS)),
        ("array.jsonl", "\n" + json.dumps(ROWS, indent=1)),
        ("a.csv", CSV),
        (
            "a.tsv",
            CSV.replace("prompt,chosen,", "prompt\tchosen\t")
            .replace("., yes,", ".\t yes\t")
            .replace(",,", "\t\t"),
        ),
    ],
)
def test_a_file_is_read_and_counted_in_any_compression(
    tmp_path: Path, name: str, text: str, packed: str
) -> None:
    path = tmp_path / (name + packed)
    path.write_bytes(COMPRESSED[packed](text.encode()))
    assert rows_of(path) == ROWS
    assert rows_in_file("data.train", str(path)) == 2


def test_cells_of_other_columns_are_numbers_where_they_can_be(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected,question,w,id\n1,2,3,4,0.5,x\n5,6,7,8,,y\n")
    texts = [{"prompt": "1", "chosen": "2", "rejected": "3", "question": "4"}]
    assert rows_of(path)[0] == {**texts[0], "w": 0.5, "id": "x"}
    assert rows_of(path)[1]["w"] == ""


def test_one_object_over_several_lines_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(TEXT_ROW, indent=1))
    assert rows_of(path) == [TEXT_ROW]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.jsonl",
            '{"a": 1}\n{"a": ' + "9" * 5000 + "}\n",
            r"data.train row 2 = .* is not JSON \(Exceeds the limit",
        ),
        (
            "a.jsonl",
            '{"a": 1}\n' + "[" * 100_000 + "\n",
            r"row 2 = .* is not JSON \(it is nested too deeply\)",
        ),
        (
            "a.json",
            '[{"a": 1}, ' + "[" * 100_000,
            r"row 2 = .* is not JSON \(it is nested too deeply\)",
        ),
        (
            "a.json",
            '[{"a": 1}, {"a": 9}',
            "data.train = .*the array ends after row 2 without a bracket",
        ),
        ("a.json", '[{"a": 1} {"a": 9}]', "row 1 = .*neither a comma and another row nor the end"),
        ("a.json", '[{"a": 1}] [1]', r"data.train = '\[1\]': follows the end of the JSON array"),
        ("a.json", '[{"a": 1}, {a: 2}]', "data.train row 2 = .* is not JSON"),
        ("a.json", '{"a": 1,\n "b": }', r"data.train = .* is not JSON \(Expecting value, line 2"),
        (
            "a.csv",
            "a,b\n1,2\n1,2,3\n",
            r"data.train row 2 = \['3'\]: has more cells than the header",
        ),
        ("a.csv", 'a,b\n1,"2\n', r"data.train row 1 = .* is not CSV"),
        ("a.csv", b"a,b\n1,\xff\n", "is not UTF-8 text"),
        ("a.jsonl.gz", b"no gzip", "data.train = .*cannot be read .Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(JSONL.encode())[:-9], "cannot be read .Compressed file ended"),
        ("a.jsonl.bz2", b"no bzip2", "cannot be read"),
        ("a.jsonl.xz", b"no xz", "cannot be read"),
        ("a.jsonl.zst", b"no zstandard", "cannot be read"),
    ],
    ids=range(16),
)
def test_a_damaged_file_is_one_line(
    tmp_path: Path, name: str, content: str | bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=words) as caught:
        rows_of(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["stream", "file"])
def test_arrow_files_are_counted_in_both_formats(tmp_path: Path, form: str) -> None:
    from orchestrator.data.readers import arrow_table

    table, path = pa.Table.from_pylist(ROWS), tmp_path / "a.arrow"
    writer = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
    with writer(str(path), table.schema) as opened:
        opened.write_table(table)
    assert rows_in_file("data.train", str(path)) == 2
    assert arrow_table(str(path)).to_pylist() == ROWS


def test_a_broken_arrow_or_parquet_file_is_one_line(tmp_path: Path) -> None:
    for name in ("a.arrow", "a.parquet"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(UserError, match=r"data.train = .*cannot be read"):
            rows_in_file("data.train", str(tmp_path / name))
