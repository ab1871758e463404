"""Rows are the same from any format, folder or split, and what cannot be read is refused."""

import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from orchestrator.data.pair_cache import tokenized_pairs
from orchestrator.data.sources import (
    SourceRows,
    check_rows,
    check_source,
    count_rows,
    open_source,
    raw_rows,
    training_texts,
)
from orchestrator.settings.data import SourceSpec
from orchestrator.settings.errors import UserError
from orchestrator.settings.load import make_spec
from support.tiny_parts import CHAT_ROW, TEXT_ROW, data_spec, tokenized, tokenizer
from support.tiny_settings import random_rows, raw_settings, write_jsonl

MALFORMED = {"prompt": "no answers"}


def written(folder: Path, form: str, content: list[dict[str, Any]]) -> Path:
    """The rows in a file or folder of that format."""
    import datasets

    lines = [json.dumps(row) for row in content]
    texts = {
        "lines.jsonl": "\n".join(lines) + "\n",
        "blank lines.jsonl": "\n\n".join(lines) + "\n \n",
        "byte order mark.jsonl": "\ufeff" + "\n".join(lines),
        "lines.json": "\n".join(lines),
        "array.json": json.dumps(content, indent=1),
        "indented array.json": "\n  " + json.dumps(content),
    }
    path = folder / form
    if form in texts:
        path.write_text(texts[form], encoding="utf-8")
    elif form in ("packed.jsonl.gz", "packed.jsonl.xz"):
        pack = gzip.compress if form.endswith("gz") else lzma.compress
        path.write_bytes(pack(texts["lines.jsonl"].encode()))
    elif form == "file.arrow":
        table = datasets.Dataset.from_list(content).data.table
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    elif form == "file.csv":
        pd.DataFrame(content).to_csv(path, index=False)
    elif form == "file.parquet":
        datasets.Dataset.from_list(content).to_parquet(str(path))
    elif form == "saved folder":
        datasets.Dataset.from_list(content).save_to_disk(str(path))
    else:
        other = datasets.Dataset.from_list(random_rows(3, seed=9))
        datasets.DatasetDict(
            {"train": datasets.Dataset.from_list(content), "test": other}
        ).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize(
    "form",
    [
        "lines.jsonl",
        "blank lines.jsonl",
        "byte order mark.jsonl",
        "lines.json",
        "array.json",
        "indented array.json",
        "packed.jsonl.gz",
        "packed.jsonl.xz",
        "file.arrow",
        "file.parquet",
        "saved folder",
        "saved folder of splits",
    ],
)
def test_every_format_holds_the_same_pairs(tmp_path: Path, form: str, conversational: bool) -> None:
    content = random_rows(6, conversational=conversational)
    # a tie, to see the row numbers move
    content.insert(2, {**content[0], "chosen": content[0]["rejected"]})
    path = written(tmp_path, form, content)
    data = data_spec(train=str(path))
    pairs = tokenized_pairs(data, "train", tokenizer(), tmp_path / "cache")
    assert pairs.pair_ids.tolist() == [1, 2, 4, 5, 6, 7]
    for index, row in enumerate(content[:2] + content[3:]):
        assert (
            pairs[index]["prompt_ids"],
            pairs[index]["chosen_ids"],
            pairs[index]["rejected_ids"],
        ) == tokenized(row)
    raw = raw_rows(data, "train", [7, 2, 2, 8])
    assert raw == {number: (str(path), number, content[number - 1]) for number in (2, 7)}


def test_a_csv_file_holds_the_same_pairs(tmp_path: Path) -> None:
    content = [{**row, "w": 0.5} for row in random_rows(4)]
    path = written(tmp_path, "file.csv", content)
    pairs = tokenized_pairs(
        data_spec(train=str(path), weight_column="w"), "train", tokenizer(), tmp_path / "cache"
    )
    assert [pairs[index]["prompt_ids"] for index in range(4)] == [
        tokenized(row).prompt_ids for row in content
    ]
    assert pairs.weights is not None
    assert pairs.weights.tolist() == [0.5] * 4
    assert count_rows("data.train", SourceSpec(path=str(path)), "train") == 4


def test_a_row_has_its_prompt_and_one_that_is_no_pair_any_more_is_left_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"chosen": "a b", "rejected": "a c"}, MALFORMED])
    raw = raw_rows(data_spec(train=str(path)), "train", {1, 2, 3})
    assert raw == {1: (str(path), 1, {"prompt": "a", "chosen": " b", "rejected": " c"})}
    with pytest.raises(UserError, match="does not exist"):
        raw_rows(data_spec(train="gone.jsonl"), "train", {1})


def test_the_evaluation_split_of_a_saved_folder_is_its_test_split(tmp_path: Path) -> None:
    path = written(tmp_path, "splits", random_rows(6))
    data = data_spec(train=str(path), eval=str(path))
    assert len(tokenized_pairs(data, "eval", tokenizer(), tmp_path / "cache")) == 3


def test_a_source_names_its_split(tmp_path: Path) -> None:
    path = written(tmp_path, "splits", random_rows(6))
    sets = [{"path": str(path), "split": "test"}, {"path": str(path)}]
    data = data_spec(train=sets, eval={"path": str(path), "split": "train"})
    pairs = tokenized_pairs(data, "train", tokenizer(), tmp_path / "cache")
    assert [share.pairs for share in pairs.shares] == [3, 6]
    assert len(tokenized_pairs(data, "eval", tokenizer(), tmp_path / "cache")) == 6
    assert raw_rows(data, "train", {3, 4})[4].row == random_rows(6)[0]
    for wrong, words in (
        (
            "odd",
            r"data\.train = .*: has no split 'odd'; its splits are train, test; .*split: train",
        ),
        (
            "train",
            r"data\.train\.split = 'train': .* is a single data set without splits; remove it",
        ),
    ):
        saved = path if wrong == "odd" else written(tmp_path, "saved folder", random_rows(2))
        data = data_spec(train={"path": str(saved), "split": wrong})
        with pytest.raises(UserError, match=words):
            tokenized_pairs(data, "train", tokenizer(), tmp_path / "cache")


def test_a_folder_of_files_is_one_source(tmp_path: Path) -> None:
    content = random_rows(5)
    folder = tmp_path / "parts"
    folder.mkdir()
    for number, part in enumerate((content[:2], content[2:])):
        write_jsonl(folder / f"part-{number}.jsonl", part)
    data = data_spec(train=str(folder))
    assert len(tokenized_pairs(data, "train", tokenizer(), tmp_path / "cache")) == 5
    assert [row.row for row in raw_rows(data, "train", range(1, 6)).values()] == content


def test_a_hub_source_names_its_configuration_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    values: list[tuple[Any, ...]] = []

    def load(path: str, name: str | None, *, split: str) -> Any:
        values.append((path, name, split))
        return datasets.Dataset.from_list(random_rows(2, seed=len(values)))

    monkeypatch.setattr(datasets, "load_dataset", load)
    sets = ["org/plain", {"path": "org/named", "name": "binary", "split": "train_prefs"}]
    data = data_spec(train=sets, eval={"path": "org/named", "split": "test_prefs"})
    assert len(tokenized_pairs(data, "train", tokenizer(), tmp_path / "cache")) == 4
    assert len(tokenized_pairs(data, "eval", tokenizer(), tmp_path / "cache")) == 2
    assert values == [
        ("org/plain", None, "train"),
        ("org/named", "binary", "train_prefs"),
        ("org/named", None, "test_prefs"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"prompt": "x"\n', "data.train row 1 = .* is not JSON"),
        ("b.jsonl", b'{"prompt": "\xff"}', "is not UTF-8 text"),
        ("c.json", b"[1, 2", "is not JSON"),
        ("d.parquet", b"nothing", "cannot be read by `datasets`"),
        ("e.jsonl", None, "does not exist"),
    ],
)
def test_an_unreadable_source_is_refused(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        tokenized_pairs(data_spec(train=str(path)), "train", tokenizer(), tmp_path / "cache")


def test_rows_are_counted_without_loading(tmp_path: Path) -> None:
    path = written(tmp_path, "blank lines.jsonl", random_rows(6))
    assert count_rows("data.train", SourceSpec(path=str(path)), "train") == 6
    assert count_rows("data.train", SourceSpec(path="org/dataset"), "train") is None
    for form in ("packed.jsonl.gz", "file.arrow", "file.parquet", "saved folder", "splits"):
        source = SourceSpec(path=str(written(tmp_path, form, random_rows(6))))
        assert count_rows("data.train", source, "train") == 6
    assert count_rows("data.eval", source, "eval") == 3


def test_splits_of_a_folder_or_the_hub_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    parts = {
        "train_prefs": datasets.Dataset.from_list(random_rows(2)),
        "test_prefs": datasets.Dataset.from_list(random_rows(1)),
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "files").mkdir()
    write_jsonl(tmp_path / "files" / "test.jsonl", random_rows(2))

    def load(*_: Any, **__: Any) -> Any:
        raise ValueError("Unknown split \"train\". Should be one of ['train_prefs', 'test_prefs'].")

    words = (
        r"data\.train = .*: has no split 'train'; its splits are {}; use one of them: .*, "
        r"split: {}}}"
    )
    with pytest.raises(UserError, match=words.format("train_prefs, test_prefs", "train_prefs")):
        count_rows("data.train", SourceSpec(path=str(tmp_path / "saved")), "train")
    with pytest.raises(UserError, match=words.format("test", "test")):
        count_rows("data.train", SourceSpec(path=str(tmp_path / "files")), "train")
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=words.format("train_prefs, test_prefs", "train_prefs")):
        open_source("data.train", SourceSpec(path="org/pairs"), "train")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "s3://bucket/a.jsonl",
            "s3:// is not supported; copy it to a disk that every node can read",
        ),
        ("GS://bucket/folder", "gs:// is not supported"),
        ("file:///data/a.jsonl", "remove file://: /data/a.jsonl"),
        ("hf://datasets/org/pairs", "hf:// is not supported; write org/pairs"),
        ("https://huggingface.co/datasets/org/pairs", "write org/pairs"),
        ("parts/*.jsonl", "does not exist; patterns are not expanded"),
        ("empty.jsonl", "it has no rows: the file is empty"),
        ("notes.txt", "is a .txt file, which cannot be read; convert it"),
        ("book.tar.gz", "is a .tar.gz file"),
        ("plain", "is a file without a suffix"),
        ("nothing", "is a folder without files"),
        ("model", r"is a folder without data files \(it contains weights.bin\)"),
        ("pipe.jsonl", "it is not a regular file"),
        ("pointer.parquet", "it is a git-lfs pointer"),
        ("shards", "a.parquet is a git-lfs pointer"),
    ],
)
def test_a_source_of_another_kind_is_named(
    tmp_path: Path, source: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("nothing", "model", "shards"):
        (tmp_path / folder).mkdir()
    (tmp_path / "model" / "weights.bin").write_bytes(b"0")
    for pointer in ("pointer.parquet", "shards/a.parquet"):
        (tmp_path / pointer).write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "empty.jsonl").touch()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("notes.txt", "book.tar.gz", "plain"):
        (tmp_path / name).write_text("text")
    spec = make_spec({**raw_settings(tmp_path), "data": {"train": source}})
    with pytest.raises(UserError, match=words) as caught:
        check_source("data.train", spec.data.train[0].path)
    assert caught.value.value in (source, str(tmp_path / source))


def test_all_rows_are_checked_without_a_tokenizer_as_tokenising_does(tmp_path: Path) -> None:
    good = {**TEXT_ROW, "score": 1, "w": 1}
    tie = {**TEXT_ROW, "chosen": TEXT_ROW["rejected"], "w": None}
    for content, words in (
        ([good, {**good, "chosen": None}], "row 2 = .*: chosen is null"),
        ([good, {**good, "w": -1}], "row 2 = .*: w is -1, not a finite number"),
        (
            [{**good, "tools": 3, "prompt": CHAT_ROW["prompt"]}],
            "row 1 = .*: tools is neither a list",
        ),
    ):
        data = data_spec(
            train=str(write_jsonl(tmp_path / "train.jsonl", content)), weight_column="w"
        )
        errors = []
        for check in (
            lambda data: check_rows(data, "train"),
            lambda data: tokenized_pairs(data, "train", tokenizer(), tmp_path / "cache"),
        ):
            with pytest.raises(UserError, match=words) as caught:
                check(data)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]
    path = write_jsonl(tmp_path / "train.jsonl", [good, tie, MALFORMED])
    data = data_spec(train=[str(path), "org/pairs"], weight_column="w", on_bad_row="drop")
    assert check_rows(data, "train") == [
        SourceRows("data.train.0", str(path), 3, 1, {"score": 1}, {})
    ]


def test_the_texts_a_tokenizer_is_trained_on(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [TEXT_ROW, MALFORMED, CHAT_ROW])
    texts, identity = training_texts(data_spec(train=str(path)))
    assert list(texts()) == list(texts()) == ["Say it.", " yes", " no", "Say it.", "yes", "no"]
    write_jsonl(path, [TEXT_ROW])
    assert training_texts(data_spec(train=str(path)))[1] != identity
