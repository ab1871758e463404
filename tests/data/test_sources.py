"""Rows are the same from any format, folder or split, and what cannot be read is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import rows, write_jsonl
from tiny import CHAT_ROW, TEXT_ROW, data_spec, tokenized, tokenizer

from orchestrator.data.pairs import tokenized_pairs
from orchestrator.data.sources import count_rows, raw_rows, training_texts
from orchestrator.settings.spec import SourceSpec, UserError

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
    elif form == "file.parquet":
        datasets.Dataset.from_list(content).to_parquet(str(path))
    elif form == "saved folder":
        datasets.Dataset.from_list(content).save_to_disk(str(path))
    else:
        other = datasets.Dataset.from_list(rows(3, seed=9))
        datasets.DatasetDict({"train": datasets.Dataset.from_list(content), "test": other}).save_to_disk(str(path))
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
        "file.parquet",
        "saved folder",
        "saved folder of splits",
    ],
)
def test_every_format_holds_the_same_pairs(tmp_path: Path, form: str, conversational: bool) -> None:
    content = rows(6, conversational=conversational)
    content.insert(2, {**content[0], "chosen": content[0]["rejected"]})  # a tie, to see the row numbers move
    path = written(tmp_path, form, content)
    data = data_spec(train=str(path))
    found = tokenized_pairs(data, "train", tokenizer(), tmp_path / "cache")
    assert found.pair_ids.tolist() == [1, 2, 4, 5, 6, 7]
    for index, row in enumerate(content[:2] + content[3:]):
        assert (found[index]["prompt_ids"], found[index]["chosen_ids"], found[index]["rejected_ids"]) == tokenized(row)
    asked = raw_rows(data, "train", [7, 2, 2, 8])
    assert asked == {number: (str(path), number, content[number - 1]) for number in (2, 7)}


def test_a_row_has_its_prompt_and_one_that_is_no_pair_any_more_is_left_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"chosen": "a b", "rejected": "a c"}, MALFORMED])
    found = raw_rows(data_spec(train=str(path)), "train", {1, 2, 3})
    assert found == {1: (str(path), 1, {"prompt": "a", "chosen": " b", "rejected": " c"})}
    with pytest.raises(UserError, match="does not exist"):
        raw_rows(data_spec(train="gone.jsonl"), "train", {1})


def test_the_evaluation_split_of_a_saved_folder_is_its_test_split(tmp_path: Path) -> None:
    path = written(tmp_path, "splits", rows(6))
    data = data_spec(train=str(path), eval=str(path))
    assert len(tokenized_pairs(data, "eval", tokenizer(), tmp_path / "cache")) == 3


def test_a_source_names_its_split(tmp_path: Path) -> None:
    path = written(tmp_path, "splits", rows(6))
    sets = [{"path": str(path), "split": "test"}, {"path": str(path)}]
    data = data_spec(train=sets, eval={"path": str(path), "split": "train"})
    found = tokenized_pairs(data, "train", tokenizer(), tmp_path / "cache")
    assert [share.pairs for share in found.shares] == [3, 6]
    assert len(tokenized_pairs(data, "eval", tokenizer(), tmp_path / "cache")) == 6
    assert raw_rows(data, "train", {3, 4})[4].row == rows(6)[0]
    for wrong, words in (
        ("odd", r"data\.train = .*: has no split 'odd'; its splits are train, test; .*split: train"),
        ("train", r"data\.train\.split = 'train': .* is one data set, without splits; remove it"),
    ):
        saved = path if wrong == "odd" else written(tmp_path, "saved folder", rows(2))
        data = data_spec(train={"path": str(saved), "split": wrong})
        with pytest.raises(UserError, match=words):
            tokenized_pairs(data, "train", tokenizer(), tmp_path / "cache")


def test_a_folder_of_files_is_one_source(tmp_path: Path) -> None:
    content = rows(5)
    folder = tmp_path / "parts"
    folder.mkdir()
    for number, part in enumerate((content[:2], content[2:])):
        write_jsonl(folder / f"part-{number}.jsonl", part)
    data = data_spec(train=str(folder))
    assert len(tokenized_pairs(data, "train", tokenizer(), tmp_path / "cache")) == 5
    assert [row.row for row in raw_rows(data, "train", range(1, 6)).values()] == content


def test_a_hub_source_names_its_configuration_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(path: str, name: str | None, *, split: str) -> Any:
        asked.append((path, name, split))
        return datasets.Dataset.from_list(rows(2, seed=len(asked)))

    monkeypatch.setattr(datasets, "load_dataset", load)
    sets = ["org/plain", {"path": "org/named", "name": "binary", "split": "train_prefs"}]
    data = data_spec(train=sets, eval={"path": "org/named", "split": "test_prefs"})
    assert len(tokenized_pairs(data, "train", tokenizer(), tmp_path / "cache")) == 4
    assert len(tokenized_pairs(data, "eval", tokenizer(), tmp_path / "cache")) == 2
    assert asked == [
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
def test_an_unreadable_source_is_refused(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        tokenized_pairs(data_spec(train=str(path)), "train", tokenizer(), tmp_path / "cache")


def test_rows_are_counted_without_loading(tmp_path: Path) -> None:
    path = written(tmp_path, "blank lines.jsonl", rows(6))
    assert count_rows("data.train", SourceSpec(path=str(path)), "train") == 6
    assert count_rows("data.train", SourceSpec(path="org/dataset"), "train") is None


def test_the_texts_a_tokenizer_is_trained_on(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [TEXT_ROW, MALFORMED, CHAT_ROW])
    texts, identity = training_texts(data_spec(train=str(path)))
    assert list(texts()) == list(texts()) == ["Say it.", " yes", " no", "Say it.", "yes", "no"]
    write_jsonl(path, [TEXT_ROW])
    assert training_texts(data_spec(train=str(path)))[1] != identity
