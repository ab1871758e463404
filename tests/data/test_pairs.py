"""Raw rows become token ids as TRL makes them, from any format, once, however many processes ask."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import rows, write_jsonl
from tiny import EOS, data_spec, ids, tokenizer

from orchestrator.data import pairs as module
from orchestrator.data.order import Share
from orchestrator.data.pairs import (
    BadRow,
    Pairs,
    TokenizedPair,
    build_once,
    count_rows,
    raw_rows,
    tokenize_pair,
    tokenized_pairs,
    training_texts,
    truncated,
    without_held_out,
)
from orchestrator.settings.spec import DataSpec, UserError

TEXT = {"prompt": "Say it.", "chosen": " yes", "rejected": " no"}
CHAT = {
    "prompt": [{"role": "user", "content": "Say it."}],
    "chosen": [{"role": "assistant", "content": "yes"}],
    "rejected": [{"role": "assistant", "content": "no"}],
}
BUILDER = """
import os, sys, time
from pathlib import Path
from orchestrator.data.pairs import build_once
folder, log, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
def build(partial):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    (partial / f"by_{os.getpid()}").touch()
    time.sleep(seconds)
build_once(folder, build)
assert len(os.listdir(folder)) == 1
"""


def tokenized(row: dict[str, Any], **settings: Any) -> TokenizedPair:
    data = data_spec(**settings)
    return truncated(tokenize_pair(row, tokenizer(), data)[0], data)


def made(folder: Path, content: list[Any], **settings: Any) -> Pairs:
    """The pairs of a JSONL file of these rows."""
    path = write_jsonl(folder / "train.jsonl", content)
    return tokenized_pairs(data_spec(train=str(path), **settings), "train", tokenizer(), folder / "cache")


def builder(folder: Path, log: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", BUILDER, str(folder), str(log), str(seconds)])


# --- tokenising --------------------------------------------------------------------------------------------------


def test_text_ends_with_the_end_token_once() -> None:
    assert tokenized(TEXT) == (ids("Say it."), [*ids(" yes"), EOS], [*ids(" no"), EOS])
    assert tokenized({**TEXT, "chosen": " yes<end>"}) == tokenized(TEXT)


def test_a_conversation_ends_as_its_template_says() -> None:
    assert tokenized(CHAT) == (ids("[u]Say it.~[a]"), ids("yes~"), ids("no~"))


def test_tools_and_template_options_reach_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given in (tools, json.dumps(tools)):
        row = {**CHAT, "tools": given, "chat_template_kwargs": {"mood": "gay"}}
        assert tokenized(row)[0] == ids(f"{tools[0]};gay[u]Say it.~[a]")


@pytest.mark.parametrize(
    ("everyones", "own", "reached"),
    [
        ({"mood": "glad"}, {}, "glad"),
        ({"mood": "glad"}, {"chat_template_kwargs": {"mood": "sad"}}, "sad"),
        ({"mood": "glad"}, {"chat_template_kwargs": {"mood": None}}, "glad"),  # how Parquet says that it has none
        ({"tools": [{"a": 1}]}, {}, "{'a': 1};"),
        ({"tools": [{"a": 1}], "mood": "glad"}, {"tools": [{"b": 2}]}, "{'b': 2};glad"),
        ({"tools": [{"a": 1}]}, {"tools": "[]"}, ""),
    ],
)
def test_a_rows_own_template_options_win(everyones: dict[str, Any], own: dict[str, Any], reached: str) -> None:
    assert tokenized({**CHAT, **own}, chat_template_kwargs=everyones)[0] == ids(reached + "[u]Say it.~[a]")


@pytest.mark.parametrize(
    ("before", "prompt"),
    [
        ([], "[s]Be kind.~[u]Say it.~[a]"),
        ([{"role": "system", "content": "No."}], "[s]No.~[u]Say it.~[a]"),
        ([{"role": "developer", "content": ""}], "[d]~[u]Say it.~[a]"),
    ],
)
def test_a_system_prompt_is_for_conversations_without_one(before: list[Any], prompt: str) -> None:
    row = {**CHAT, "prompt": before + CHAT["prompt"]}
    assert tokenized(row, system_prompt="Be kind.") == (ids(prompt), ids("yes~"), ids("no~"))
    implicit = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
    assert tokenized(implicit, system_prompt="Be kind.") == (ids(prompt), ids("yes~"), ids("no~"))


@pytest.mark.parametrize("side", ["chosen", "rejected", "both"])
def test_the_completion_starts_where_either_side_leaves_the_prompt(side: str) -> None:
    row = {"prompt": "xa", "chosen": "b1" if side != "rejected" else "c", "rejected": "b2" if side != "chosen" else "d"}
    prompt, chosen, rejected = tokenized(row)  # "ab" is one token: the a of the prompt is not there any more
    assert prompt == ids("x")
    assert chosen == [*ids("a" + row["chosen"]), EOS]
    assert rejected == [*ids("a" + row["rejected"]), EOS]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "rest"),
    [
        ("Hi: one", "Hi: two", "Hi:", (" one", " two")),
        ("Hi: to", "Hi: two", "Hi: t", ("o", "wo")),
        ("same", "same more", "sam", ("e", "e more")),
        ("one", "two", "", ("one", "two")),
    ],
)
def test_an_implicit_prompt_is_the_common_beginning(
    chosen: str, rejected: str, prompt: str, rest: tuple[str, str]
) -> None:
    assert tokenized({"chosen": chosen, "rejected": rejected}) == (
        ids(prompt),
        [*ids(rest[0]), EOS],
        [*ids(rest[1]), EOS],
    )


def test_an_implicit_prompt_of_a_conversation() -> None:
    row = {side: CHAT["prompt"] + CHAT[side] for side in ("chosen", "rejected")}
    assert tokenized(row) == tokenized({**row, "prompt": None}) == tokenized(CHAT)


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (None, ("pppp", "ccc.", "rr.")),
        (8, ("pppp", "ccc.", "rr.")),
        (7, ("pppp", "ccc", "rr.")),
        (5, ("pppp", "c", "r")),
    ],
)
def test_keep_start_cuts_completions(max_length: int | None, expected: tuple[str, str, str]) -> None:
    found = tokenized({"prompt": "pppp", "chosen": "ccc", "rejected": "rr"}, max_length=max_length)
    assert found == tuple([t for part in ids(text) for t in [EOS if [part] == ids(".") else part]] for text in expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_prompt_length": 9}, ("12345678", "hijkl.", "vw.")),
        ({"max_prompt_length": 3}, ("678", "hijkl.", "vw.")),
        ({"max_completion_length": 6}, ("12345678", "hijkl.", "vw.")),
        ({"max_completion_length": 3}, ("12345678", "hij", "vw.")),
        ({"max_prompt_length": 3, "max_length": 7}, ("678", "hijk", "vw.")),  # a prompt that would have filled it
        ({"max_completion_length": 2, "max_length": 9}, ("12345678", "h", "v")),
        ({"max_completion_length": 2, "max_length": 20}, ("12345678", "hi", "vw")),
        ({"max_prompt_length": 3, "max_completion_length": 2, "max_length": 4, "truncation": "keep_end"}, None),
    ],
)
def test_prompts_keep_their_end_and_completions_their_start(settings: dict[str, Any], expected: Any) -> None:
    found = tokenized({"prompt": "12345678", "chosen": "hijkl", "rejected": "vw"}, **settings)
    texts = expected or ("678", "hi", "vw")
    assert found == tuple([t for part in text for t in ([EOS] if part == "." else ids(part))] for text in texts)


def test_keep_end_is_left_to_the_collator() -> None:
    assert tokenized(TEXT, max_length=3, truncation="keep_end") == tokenized(TEXT)


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        (["not", "an object"], "malformed rows", "is a list"),
        ({"prompt": "a", "chosen": "b"}, "malformed rows", "no column 'rejected'; its columns are 'prompt', 'chosen'"),
        ({**TEXT, "chosen": None}, "malformed rows", "no column 'chosen'"),
        ({**TEXT, "chosen": 3}, "malformed rows", "chosen is int"),
        ({**TEXT, "prompt": CHAT["prompt"]}, "malformed rows", "mixes text and messages"),
        ({"chosen": "text", "rejected": CHAT["rejected"]}, "malformed rows", "chosen is str and rejected list"),
        ({**CHAT, "prompt": []}, "malformed rows", "empty list"),
        ({**CHAT, "chosen": [{"content": "x"}]}, "malformed rows", "message 1 of chosen has no role"),
        (
            {**CHAT, "chosen": [{"role": "assistant", "content": 3}]},
            "malformed rows",
            "message 1 of chosen has no text",
        ),
        ({**CHAT, "tools": "[not JSON"}, "malformed rows", "tools"),
        ({**CHAT, "tools": {"name": "f"}}, "malformed rows", "tools is not a list of objects"),
        ({**CHAT, "tools": '["f"]'}, "malformed rows", "tools is not a list of objects"),
        ({**CHAT, "chat_template_kwargs": "text"}, "malformed rows", "chat_template_kwargs"),
        ({**CHAT, "chat_template_kwargs": {"padding": True}}, "malformed rows", "'padding', which is no variable"),
        ({**TEXT, "rejected": " yes"}, "ties", "chosen equals rejected"),
        ({**TEXT, "prompt": "long " * 9}, "prompts that fill data.max_length", "45 tokens, data.max_length is 40"),
        ({**CHAT, "chosen": []}, "empty completions", "chosen has no token of its own"),
    ],
)
def test_an_unusable_row_says_why(row: Any, kind: str, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        tokenized(row, max_length=40)
    assert caught.value.kind == kind
    assert reason in caught.value.reason


def test_a_rows_variable_that_its_template_does_not_read_is_counted(tmp_path: Path) -> None:
    variables = [{"moood": 1, "x9": 1}, {"moood": 2, "mood": "sad"}, {"moood": None}, {}]
    found = made(tmp_path, [{**CHAT, "chat_template_kwargs": each} for each in variables])
    assert found.unread == found.sets[0].unread == {"moood (it reads mood)": 2, "x9": 1}
    moods = [{**CHAT, "chat_template_kwargs": {"mood": each.get("mood")}} for each in variables]
    assert [found.tokens(index).tolist() for index in range(4)] == [[*chain(*tokenized(row))] for row in moods]


def test_a_pair_that_truncation_makes_alike_is_a_tie() -> None:
    with pytest.raises(BadRow) as caught:
        tokenized({"prompt": "p", "chosen": "same1", "rejected": "same2"}, max_length=5)
    assert caught.value.kind == "ties"


@pytest.mark.parametrize("key", ["system_prompt", "chat_template_kwargs"])
def test_what_acts_on_conversations_alone_is_refused_beside_text(key: str) -> None:
    with pytest.raises(BadRow, match=f"is plain text, on which data.{key} does not act"):
        tokenized(TEXT, **{key: "Be kind." if key == "system_prompt" else {"mood": "glad"}})
    assert tokenized({**TEXT, "tools": "no matter", "chat_template_kwargs": {"mood": 1}}) == tokenized(
        TEXT
    )  # as in TRL


def test_a_setting_that_the_template_does_not_read_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"data.chat_template_kwargs.moood = False: is not read .*; did you mean mood\?"
    ):
        tokenized(CHAT, chat_template_kwargs={"moood": False})


@pytest.mark.parametrize(
    ("template", "error", "said"),
    [
        (None, UserError, "has no chat template, but the data are conversations; set data.chat_template"),
        ({"rag": "{{ messages }}"}, UserError, "has no chat template that is the default"),
        ("{% for m in messages %}", UserError, r"model.tokenizer = .*is not Jinja: Unexpected end of template.*line 1"),
        ("{{ raise_exception('No.') }}", BadRow, "the chat template refuses it: No."),
        ("{{ messages }}", BadRow, "has tools, not read by the chat template"),
    ],
)
def test_a_template_that_does_not_do_is_refused(
    template: Any, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer(), "chat_template", template)
    with pytest.raises(error, match=said):
        tokenized({**CHAT, "tools": [{"name": "f"}]} if "messages }" in str(template) else CHAT)


# --- rows --------------------------------------------------------------------------------------------------------

GONE: Any = object()
GOOD, TIE, MALFORMED = TEXT, {**TEXT, "chosen": " no"}, {"prompt": "no answers"}


@pytest.mark.parametrize(
    ("content", "on_bad_row", "row_numbers", "dropped"),
    [
        ([GOOD, TIE, GOOD], None, [1, 3], {"ties": 1}),
        ([TIE, MALFORMED, TIE, GOOD], "drop", [4], {"ties": 2, "malformed rows": 1}),
        ([GOOD, MALFORMED], None, "row 2", None),
        ([GOOD, GOOD, TIE], "error", "row 3", None),
    ],
)
def test_what_happens_to_unusable_rows(
    tmp_path: Path, content: list[Any], on_bad_row: str | None, row_numbers: Any, dropped: dict[str, int] | None
) -> None:
    if isinstance(row_numbers, str):
        with pytest.raises(UserError, match=f"data.train {row_numbers} = .*data.on_bad_row=drop"):
            made(tmp_path, content, on_bad_row=on_bad_row)
        return
    found = made(tmp_path, content, on_bad_row=on_bad_row)
    assert found.pair_ids.tolist() == row_numbers
    assert found.dropped == dropped


@pytest.mark.parametrize("content", [[], [TIE, TIE]])
def test_no_pair_left_is_refused(tmp_path: Path, content: list[Any]) -> None:
    with pytest.raises(UserError, match="leaves no pair to train on"):
        made(tmp_path, content)


def test_pairs_are_read_back_as_a_collator_takes_them(tmp_path: Path) -> None:
    content = rows(20)
    found = made(tmp_path, content)
    assert len(found) == 20
    for index, row in enumerate(content):
        prompt, chosen, rejected = tokenized(row)
        expected = {"pair_id": index + 1, "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        assert found[index] == expected
        assert found.lengths[index].tolist() == [len(prompt), len(chosen), len(rejected)]


def test_the_lengths_before_truncation_are_kept_of_dropped_rows_too(tmp_path: Path) -> None:
    content = [{**GOOD, "prompt": "p" * 9, "chosen": "c" * 30}, MALFORMED, TIE, {**GOOD, "prompt": "p" * 20}]
    cuts = {"max_length": 12, "max_completion_length": 2}
    found = made(tmp_path, content, on_bad_row="drop", **cuts)
    assert found.lengths.tolist() == [[9, 2, 2]]
    assert found.sets[0].dropped == found.dropped
    assert found.sets[0].uncut_lengths.tolist() == [[9, 31, 4], [7, 4, 4], [20, 5, 4]]


# --- formats -----------------------------------------------------------------------------------------------------


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
    for wrong, words in (("odd", "KeyError: 'odd'"), ("train", "one data set, without splits")):
        saved = path if wrong == "odd" else written(tmp_path, "saved folder", rows(2))
        data = data_spec(train={"path": str(saved), "split": wrong})
        with pytest.raises(UserError, match=rf"data\.train = .* \({words}|{words}"):
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
    assert count_rows("data.train", str(path)) == 6
    assert count_rows("data.train", "org/dataset") is None


def test_the_texts_a_tokenizer_is_trained_on(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [TEXT, MALFORMED, CHAT])
    texts, identity = training_texts(data_spec(train=str(path)))
    assert list(texts()) == list(texts()) == ["Say it.", " yes", " no", "Say it.", "yes", "no"]
    write_jsonl(path, [TEXT])
    assert training_texts(data_spec(train=str(path)))[1] != identity


# --- several training sets ---------------------------------------------------------------------------------------

SETS = [[TIE, GOOD, GOOD, TIE], rows(3, conversational=True), [MALFORMED, *rows(4, seed=1)]]


def several(folder: Path, contents: list[list[Any]], **settings: Any) -> tuple[DataSpec, Pairs]:
    """The pairs of a JSONL file for each list of rows, of weights 1, 2, 3, ..."""
    paths = [write_jsonl(folder / f"{number}.jsonl", content) for number, content in enumerate(contents)]
    sets = [{"path": str(path), "weight": weight} for weight, path in enumerate(paths, 1)]
    data = data_spec(train=sets, **settings)
    return data, tokenized_pairs(data, "train", tokenizer(), folder / "cache")


def test_the_pairs_of_several_sets_are_those_of_each(tmp_path: Path) -> None:
    data, found = several(tmp_path, SETS, on_bad_row="drop")
    alone = [
        tokenized_pairs(data_spec(train=each.path, on_bad_row="drop"), "train", tokenizer(), tmp_path / "cache")
        for each in data.train
    ]
    assert found.pair_ids.tolist() == [2, 3, 5, 6, 7, 9, 10, 11, 12]
    before = iter([0, 0, 4, 4, 4, 7, 7, 7, 7])
    rows_of = [pairs[index] for pairs in alone for index in range(len(pairs))]
    assert [found[index] for index in range(9)] == [
        {**row, "pair_id": row["pair_id"] + next(before)} for row in rows_of
    ]
    assert np.array_equal(found.hashes, np.concatenate([pairs.hashes for pairs in alone]))
    assert found.dropped == {"ties": 2, "malformed rows": 1}
    assert found.shares == (Share(2, 2), Share(3, 6), Share(4, 12))
    assert found.pairs_per_epoch == 20
    assert all(isinstance(tokens, np.memmap) for tokens in found._tokens)


def test_a_pair_of_several_sets_leads_to_its_row(tmp_path: Path) -> None:
    data, found = several(tmp_path, SETS, on_bad_row="drop")
    asked = raw_rows(data, "train", found.pair_ids.tolist())
    assert list(asked) == found.pair_ids.tolist()
    for pair_id, (source, number, row) in asked.items():
        key, path, place = found.place(pair_id)
        assert (path, place) == (source, number)
        which = int(key.removeprefix("data.train."))
        assert data.train[which].path == path
        assert row == SETS[which][place - 1]
    assert str(found.place(9)) == "data.train.2 row 2"
    assert raw_rows(data, "train", {6, 1, 4, 8, 99}).keys() == {6, 1, 4}


def test_some_pairs_of_several_sets(tmp_path: Path) -> None:
    _, found = several(tmp_path, SETS, on_bad_row="drop")
    few = found.only(np.array([7, 0, 5]))
    assert [few[index] for index in range(3)] == [found[index] for index in (0, 5, 7)]
    assert few.shares == (Share(1, 1), Share(0, 0), Share(2, 6))


def test_the_identity_of_several_sets_is_of_all_of_them(tmp_path: Path) -> None:
    first, second, third = ([GOOD], [GOOD, GOOD], rows(3))
    found = [several(tmp_path, contents)[1] for contents in ([first, second], [second, first], [first, third], [first])]
    assert len({pairs.identity for pairs in found}) == 4
    assert found[3].identity == found[3].sets[0].folder.name


def test_a_bad_row_of_several_sets_is_named_with_its_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train\.1 row 2 = .*; mend that row of \S+/1\.jsonl"):
        several(tmp_path, [[GOOD], [GOOD, MALFORMED]])
    with pytest.raises(UserError, match=r"data\.train\.1 = .*/1\.jsonl': leaves no pair"):
        several(tmp_path, [[GOOD], [TIE]])


def test_a_tokenizer_is_trained_on_all_sets(tmp_path: Path) -> None:
    data, _ = several(tmp_path, [[TEXT], [CHAT]])
    texts, identity = training_texts(data)
    assert list(texts()) == ["Say it.", " yes", " no", "Say it.", "yes", "no"]
    assert identity not in {training_texts(data_spec(train=each.path))[1] for each in data.train}


# --- a part that is held out -------------------------------------------------------------------------------------


def of_prompts(folder: Path, *sets: list[str], **settings: Any) -> Pairs:
    """Pairs with these prompts, no two of them alike."""
    numbers = count()
    contents = [
        [{"prompt": prompt, "chosen": f" {next(numbers)}", "rejected": " no"} for prompt in each] for each in sets
    ]
    return several(folder, contents, **settings)[1]


def prompts_of(pairs: Pairs) -> list[str]:
    return [bytes(pairs[index]["prompt_ids"]).decode("latin-1") for index in range(len(pairs))]


@pytest.fixture(scope="module")
def fifty(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """50 pairs of 20 prompts, which have 1 to 4 pairs each, in both of two sets where they can."""
    prompts = [letter * 3 for place, letter in enumerate("cdefghijklmnopqrstuv") for _ in range(1 + place % 4)]
    return of_prompts(tmp_path_factory.mktemp("fifty"), prompts[::2], prompts[1::2])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 0.9])
def test_a_fraction_is_held_out_by_prompt(fifty: Pairs, fraction: float, seed: int) -> None:
    train, held_out = without_held_out(fifty, fraction, seed)
    assert set(prompts_of(train)).isdisjoint(prompts_of(held_out))
    assert sorted([*train.pair_ids, *held_out.pair_ids]) == fifty.pair_ids.tolist()
    assert abs(len(held_out) - fraction * len(fifty)) <= 4 / 2  # half of the largest prompt
    for part in (train, held_out):
        whole = {int(pair_id): fifty[index] for index, pair_id in enumerate(fifty.pair_ids)}
        assert [part[index] for index in range(len(part))] == [whole[int(pair_id)] for pair_id in part.pair_ids]
    assert [share.pairs for share in train.shares] == [
        sum(fifty.place(pair_id).key == each.key for pair_id in train.pair_ids) for each in fifty.sets
    ]
    again = without_held_out(fifty, fraction, seed)[1]
    assert np.array_equal(again.pair_ids, held_out.pair_ids)
    other = without_held_out(fifty, fraction, seed + 99)[1]
    assert not np.array_equal(other.pair_ids, held_out.pair_ids)


def test_what_is_held_out_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    prompts = [f"prompt {number}" for number in range(12)]
    found = [without_held_out(of_prompts(tmp_path, made), 0.25, 7)[1] for made in (prompts, prompts[::-1])]
    assert set(prompts_of(found[0])) == set(prompts_of(found[1]))


def test_a_large_prompt_is_left_where_others_come_nearer(tmp_path: Path) -> None:
    made = of_prompts(tmp_path, ["large"] * 6 + ["a", "b", "c", "d"])
    for seed in range(5):
        assert "large" not in prompts_of(without_held_out(made, 0.2, seed)[1])
        assert len(without_held_out(made, 0.2, seed)[1]) == 2


@pytest.mark.parametrize(
    ("sets", "fraction", "words"),
    [
        ([["a"] * 5 + ["b"] * 5], 0.1, "holds out none, of 10 pairs with 2 prompts; raise it"),
        ([["a"] * 5], 0.9, r"holds out every pair of \S+/0.jsonl, of 5 pairs with 1 prompts; lower it"),
        ([["a"], ["a"] * 3 + ["b"]], 0.9, r"holds out every pair of \S+/0.jsonl, of 5 pairs with 2 prompts; lower it"),
    ],
)
def test_a_fraction_that_leaves_nothing_is_refused(
    tmp_path: Path, sets: list[list[str]], fraction: float, words: str
) -> None:
    with pytest.raises(UserError, match=rf"^data\.eval_fraction = {fraction}: {words}"):
        without_held_out(of_prompts(tmp_path, *sets), fraction, 7)


def test_rows_that_are_held_out_are_found(tmp_path: Path) -> None:
    data, found = several(tmp_path, SETS, on_bad_row="drop", eval_fraction=0.3)
    _, held_out = without_held_out(found, 0.3, 7)
    asked = raw_rows(data, "eval", held_out.pair_ids.tolist())
    assert list(asked) == held_out.pair_ids.tolist()
    assert {(row.source, row.number) for row in asked.values()} == {found.place(i)[1:] for i in asked}


# --- weights and margins -----------------------------------------------------------------------------------------

WEIGHED = [{**row, "w": weight, "m": -weight} for row, weight in zip(rows(3), (2.0, 0.5, 3.0), strict=True)]


@pytest.mark.parametrize("columns", [["weight"], ["margin"], ["weight", "margin"]])
@pytest.mark.parametrize("parquet", [False, True])
def test_pairs_have_the_weights_and_margins_of_their_rows(tmp_path: Path, columns: list[str], parquet: bool) -> None:
    import datasets

    content = [{**TIE, "w": None, "m": None}, *WEIGHED]
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_list(content).to_parquet(str(path))
    named = {f"{column}_column": column[0] for column in columns}
    source = str(path) if parquet else str(write_jsonl(tmp_path / "train.jsonl", content))
    data = data_spec(train=[source, source], **named)
    found = tokenized_pairs(data, "train", tokenizer(), tmp_path / "cache")
    expected = {"weight": [2.0, 0.5, 3.0] * 2, "margin": [-2.0, -0.5, -3.0] * 2}
    for column, values in (("weight", found.weights), ("margin", found.margins)):
        if column not in columns:
            assert values is None
            assert column not in found[0]
            continue
        assert values is not None
        assert (values.dtype, values.tolist()) == (np.float64, expected[column])
        assert [found[index][column] for index in range(6)] == expected[column]
        assert [row[column] for row in map(found.only(np.array([4, 1])).__getitem__, range(2))] == [
            expected[column][index] for index in (1, 4)
        ]


@pytest.mark.parametrize(
    ("column", "change", "words"),
    [
        ("weight", {"w": 0}, "w is 0, not a finite number more than 0 (data.weight_column)"),
        ("weight", {"w": -1.5}, "w is -1.5, not a finite number more than 0"),
        ("weight", {"w": float("inf")}, "w is inf, not a finite number"),
        ("weight", {"w": float("nan")}, "w is nan, not a finite number"),
        ("weight", {"w": 10**400}, "not a finite number"),
        ("weight", {"w": True}, "w is True, not a finite number"),
        ("weight", {"w": "3"}, "w is '3', not a finite number"),
        ("margin", {"m": None}, "m is None, not a finite number (data.margin_column)"),
        ("margin", {"m": float("-inf")}, "m is -inf, not a finite number"),
        (
            "margin",
            {"m": GONE},
            "has no column 'm' (data.margin_column); its columns are 'prompt', 'chosen', 'rejected', 'w'",
        ),
    ],
)
def test_a_row_without_a_usable_number_is_malformed(
    tmp_path: Path, column: str, change: dict[str, Any], words: str
) -> None:
    changed = {name: value for name, value in {**WEIGHED[1], **change}.items() if value is not GONE}
    content = [WEIGHED[0], changed, WEIGHED[2]]
    with pytest.raises(UserError, match=f"data.train row 2 = .*{re.escape(words)}"):
        made(tmp_path, content, **{f"{column}_column": column[0]})
    left = made(tmp_path, content, on_bad_row="drop", **{f"{column}_column": column[0]})
    assert left.pair_ids.tolist() == [1, 3]
    assert left.dropped == {"malformed rows": 1}


# --- the cache ---------------------------------------------------------------------------------------------------


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were built."""
    folders: list[Path] = []
    original = module._build

    def counting(folder: Path, **arguments: Any) -> None:
        folders.append(folder)
        original(folder, **arguments)

    monkeypatch.setattr(module, "_build", counting)
    return folders


@pytest.mark.parametrize(
    ("change", "is_new"),
    [
        ({"max_length": 50}, True),
        ({"truncation": "keep_end"}, True),
        ({"on_bad_row": "drop"}, True),
        ({"max_prompt_length": 50}, True),
        ({"max_completion_length": 50}, True),
        ({"collator": "mine:collate"}, False),
        ({"weight_column": "w"}, True),
        ({"margin_column": "w"}, True),
        ({"num_proc": 1}, False),
        ({"eval": "elsewhere.jsonl"}, False),
        ({}, False),
    ],
)
def test_the_cache_is_used_until_a_setting_that_matters_changes(
    tmp_path: Path, builds: list[Path], change: dict[str, Any], is_new: bool
) -> None:
    content = [{**row, "w": 1} for row in rows(4)]
    made(tmp_path, content)
    made(tmp_path, content, **change)
    assert len(builds) == 1 + is_new


def test_a_cache_of_conversations_knows_what_their_template_was_given(tmp_path: Path, builds: list[Path]) -> None:
    for settings in ({}, {"system_prompt": "a"}, {"system_prompt": "b"}, {"chat_template_kwargs": {"mood": "glad"}}):
        made(tmp_path, rows(4, conversational=True), **settings)
    assert len(builds) == 4
    assert len(set(builds)) == 4


def test_other_content_or_another_tokenizer_is_another_cache(
    tmp_path: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path, rows(4))
    made(tmp_path, rows(4, seed=1))
    monkeypatch.setattr(tokenizer(), "chat_template", "{{ 'another' }}")
    made(tmp_path, rows(4))
    monkeypatch.undo()
    assert len(builds) == 3
    assert len(set(builds)) == 3


def test_a_build_that_fails_leaves_no_cache(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        made(tmp_path, [GOOD, MALFORMED])
    assert len(made(tmp_path, [GOOD, GOOD])) == 2


def test_several_processes_build_once(tmp_path: Path) -> None:
    folder, log = tmp_path / "cache" / "folder", tmp_path / "log"
    processes = [builder(folder, log, 0.5) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert len(log.read_text().splitlines()) == 1


def test_a_killed_builder_is_replaced(tmp_path: Path) -> None:
    folder, log = tmp_path / "cache" / "folder", tmp_path / "log"
    process = builder(folder, log, 600)
    while not log.exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not folder.exists()
    build_once(folder, lambda partial: (partial / "mine").touch())
    assert os.listdir(folder) == ["mine"]  # nothing of what the killed one had begun


def test_many_processes_tokenise_as_one_does(tmp_path: Path, builds: list[Path]) -> None:
    content = rows(module.PARALLEL_FROM + 600, longest=4)
    content[700], content[2300] = MALFORMED, {**content[0], "chosen": content[0]["rejected"]}
    found = []
    for processes in (1, 2):
        path = write_jsonl(tmp_path / "train.jsonl", content)
        data = data_spec(train=str(path), num_proc=processes, on_bad_row="drop")
        found.append(tokenized_pairs(data, "train", tokenizer(), tmp_path / f"cache {processes}"))
    folders = [next((tmp_path / f"cache {processes}" / "pairs").glob("*/")) for processes in (1, 2)]
    for name in ("tokens.npy", "lengths.npy", "rows.npy", "hashes.npy", "meta.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert found[1].dropped == {"malformed rows": 1, "ties": 1}
    assert found[1].pair_ids.tolist() == [i for i in range(1, len(content) + 1) if i not in (701, 2301)]
    assert len(builds) == 2


def test_a_bad_row_met_by_another_process_is_named(tmp_path: Path) -> None:
    content = [*rows(module.PARALLEL_FROM + 10, longest=2), MALFORMED]
    with pytest.raises(UserError, match=f"data.train row {len(content)} "):
        made(tmp_path, content, num_proc=2)
