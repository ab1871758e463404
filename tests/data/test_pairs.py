"""Rows are tokenised once, however many processes ask; the pairs of several sets, a part held out,
weights.
"""

import os
import re
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data import pairs as module
from orchestrator.data.order import Share
from orchestrator.data.pairs import Pairs, build_once, tokenized_pairs, without_held_out
from orchestrator.data.sources import raw_rows, training_texts
from orchestrator.settings.data import DataSpec
from orchestrator.settings.errors import UserError
from support.timeouts import scaled_timeout
from support.tiny_parts import CHAT_ROW, TEXT_ROW, data_spec, pairs_of, tokenized, tokenizer
from support.tiny_settings import random_rows, write_jsonl

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


def builder(folder: Path, log: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", BUILDER, str(folder), str(log), str(seconds)])


# --- rows -----------------------------------------------------------------------------------------

GONE: Any = object()
GOOD, TIE, MALFORMED = TEXT_ROW, {**TEXT_ROW, "chosen": " no"}, {"prompt": "no answers"}


@pytest.mark.parametrize(
    ("content", "on_bad_row", "row_numbers", "dropped"),
    [
        ([GOOD, TIE, GOOD], None, [1, 3], {"ties": 1}),
        ([TIE, MALFORMED, TIE, GOOD], "drop", [4], {"ties": 2, "malformed rows": 1}),
        ([GOOD, MALFORMED], None, "row 2", None),
        ([GOOD, GOOD, TIE], "error", "row 3", None),
    ],
)
def test_on_bad_row_drops_or_refuses_unusable_rows(
    tmp_path: Path,
    content: list[Any],
    on_bad_row: str | None,
    row_numbers: Any,
    dropped: dict[str, int] | None,
) -> None:
    if isinstance(row_numbers, str):
        with pytest.raises(UserError, match=f"data.train {row_numbers} = .*data.on_bad_row=drop"):
            pairs_of(tmp_path, content, on_bad_row=on_bad_row)
        return
    pairs = pairs_of(tmp_path, content, on_bad_row=on_bad_row)
    assert pairs.pair_ids.tolist() == row_numbers
    assert pairs.dropped == dropped


@pytest.mark.parametrize("content", [[], [TIE, TIE]])
def test_no_pair_left_is_refused(tmp_path: Path, content: list[Any]) -> None:
    with pytest.raises(UserError, match="leaves no pair to train on"):
        pairs_of(tmp_path, content)


def test_cached_pairs_are_read_back_in_the_collators_form(tmp_path: Path) -> None:
    content = random_rows(20)
    pairs = pairs_of(tmp_path, content)
    assert len(pairs) == 20
    for index, row in enumerate(content):
        prompt, chosen, rejected = tokenized(row)
        expected = {
            "pair_id": index + 1,
            "prompt_ids": prompt,
            "chosen_ids": chosen,
            "rejected_ids": rejected,
        }
        assert pairs[index] == expected
        assert pairs.lengths[index].tolist() == [len(prompt), len(chosen), len(rejected)]


def test_the_lengths_before_truncation_are_kept_of_dropped_rows_too(tmp_path: Path) -> None:
    content = [
        {**GOOD, "prompt": "p" * 9, "chosen": "c" * 30},
        MALFORMED,
        TIE,
        {**GOOD, "prompt": "p" * 20},
    ]
    cuts = {"max_length": 12, "max_completion_length": 2}
    pairs = pairs_of(tmp_path, content, on_bad_row="drop", **cuts)
    assert pairs.lengths.tolist() == [[9, 2, 2]]
    assert pairs.sets[0].dropped == pairs.dropped
    assert pairs.sets[0].uncut_lengths.tolist() == [[9, 31, 4], [7, 4, 4], [20, 5, 4]]


# --- several training sets ------------------------------------------------------------------------

SETS = [
    [TIE, GOOD, GOOD, TIE],
    random_rows(3, conversational=True),
    [MALFORMED, *random_rows(4, seed=1)],
]


def several(folder: Path, contents: list[list[Any]], **settings: Any) -> tuple[DataSpec, Pairs]:
    """The pairs of a JSONL file for each list of rows, of weights 1, 2, 3, ..."""
    paths = [
        write_jsonl(folder / f"{number}.jsonl", content) for number, content in enumerate(contents)
    ]
    sets = [{"path": str(path), "weight": weight} for weight, path in enumerate(paths, 1)]
    data = data_spec(train=sets, **settings)
    return data, tokenized_pairs(data, "train", tokenizer(), folder / "cache")


def test_the_pairs_of_several_sets_are_those_of_each(tmp_path: Path) -> None:
    data, actual = several(tmp_path, SETS, on_bad_row="drop")
    alone = [
        tokenized_pairs(
            data_spec(train=each.path, on_bad_row="drop"), "train", tokenizer(), tmp_path / "cache"
        )
        for each in data.train
    ]
    assert actual.pair_ids.tolist() == [2, 3, 5, 6, 7, 9, 10, 11, 12]
    before = iter([0, 0, 4, 4, 4, 7, 7, 7, 7])
    rows_of = [pairs[index] for pairs in alone for index in range(len(pairs))]
    assert [actual[index] for index in range(9)] == [
        {**row, "pair_id": row["pair_id"] + next(before)} for row in rows_of
    ]
    assert np.array_equal(actual.hashes, np.concatenate([pairs.hashes for pairs in alone]))
    assert actual.dropped == {"ties": 2, "malformed rows": 1}
    assert actual.shares == (Share(2, 2), Share(3, 6), Share(4, 12))
    assert actual.pairs_per_epoch == 20
    assert all(isinstance(tokens, np.memmap) for tokens in actual._tokens)


def test_a_pair_of_several_sets_leads_to_its_row(tmp_path: Path) -> None:
    data, actual = several(tmp_path, SETS, on_bad_row="drop")
    raw = raw_rows(data, "train", actual.pair_ids.tolist())
    assert list(raw) == actual.pair_ids.tolist()
    for pair_id, (source, number, row) in raw.items():
        key, path, place = actual.place(pair_id)
        assert (path, place) == (source, number)
        which = int(key.removeprefix("data.train."))
        assert data.train[which].path == path
        assert row == SETS[which][place - 1]
    assert str(actual.place(9)) == "data.train.2 row 2"
    assert raw_rows(data, "train", {6, 1, 4, 8, 99}).keys() == {6, 1, 4}


def test_a_subset_of_several_sets_has_the_right_pairs(tmp_path: Path) -> None:
    _, actual = several(tmp_path, SETS, on_bad_row="drop")
    few = actual.only(np.array([7, 0, 5]))
    assert [few[index] for index in range(3)] == [actual[index] for index in (0, 5, 7)]
    assert few.shares == (Share(1, 1), Share(0, 0), Share(2, 6))


def test_the_identity_of_several_sets_is_of_all_of_them(tmp_path: Path) -> None:
    first, second, third = ([GOOD], [GOOD, GOOD], random_rows(3))
    values = [
        several(tmp_path, contents)[1]
        for contents in ([first, second], [second, first], [first, third], [first])
    ]
    assert len({pairs.identity for pairs in values}) == 4
    assert values[3].identity == values[3].sets[0].folder.name


def test_a_bad_row_of_several_sets_is_named_with_its_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train\.1 row 2 = .*; fix that row of \S+/1\.jsonl"):
        several(tmp_path, [[GOOD], [GOOD, MALFORMED]])
    with pytest.raises(UserError, match=r"data\.train\.1 = .*/1\.jsonl': leaves no pair"):
        several(tmp_path, [[GOOD], [TIE]])


def test_a_tokenizer_is_trained_on_all_sets(tmp_path: Path) -> None:
    data, _ = several(tmp_path, [[TEXT_ROW], [CHAT_ROW]])
    texts, identity = training_texts(data)
    assert list(texts()) == ["Say it.", " yes", " no", "Say it.", "yes", "no"]
    assert identity not in {training_texts(data_spec(train=each.path))[1] for each in data.train}


# --- a part that is held out ----------------------------------------------------------------------


def of_prompts(folder: Path, *sets: list[str], **settings: Any) -> Pairs:
    """Pairs with these prompts, no two of them alike."""
    numbers = count()
    contents = [
        [{"prompt": prompt, "chosen": f" {next(numbers)}", "rejected": " no"} for prompt in each]
        for each in sets
    ]
    return several(folder, contents, **settings)[1]


def prompts_of(pairs: Pairs) -> list[str]:
    return [bytes(pairs[index]["prompt_ids"]).decode("latin-1") for index in range(len(pairs))]


@pytest.fixture(scope="module")
def fifty(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """50 pairs of 20 prompts, which have 1 to 4 pairs each, in both of two sets where they can."""
    prompts = [
        letter * 3
        for place, letter in enumerate("cdefghijklmnopqrstuv")
        for _ in range(1 + place % 4)
    ]
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
        assert [part[index] for index in range(len(part))] == [
            whole[int(pair_id)] for pair_id in part.pair_ids
        ]
    assert [share.pairs for share in train.shares] == [
        sum(fifty.place(pair_id).key == each.key for pair_id in train.pair_ids)
        for each in fifty.sets
    ]
    again = without_held_out(fifty, fraction, seed)[1]
    assert np.array_equal(again.pair_ids, held_out.pair_ids)
    other = without_held_out(fifty, fraction, seed + 99)[1]
    assert not np.array_equal(other.pair_ids, held_out.pair_ids)


def test_the_held_out_part_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    prompts = [f"prompt {number}" for number in range(12)]
    values = [
        without_held_out(of_prompts(tmp_path, built), 0.25, 7)[1]
        for built in (prompts, prompts[::-1])
    ]
    assert set(prompts_of(values[0])) == set(prompts_of(values[1]))


def test_a_large_prompt_is_left_where_others_come_nearer(tmp_path: Path) -> None:
    actual = of_prompts(tmp_path, ["large"] * 6 + ["a", "b", "c", "d"])
    for seed in range(5):
        assert "large" not in prompts_of(without_held_out(actual, 0.2, seed)[1])
        assert len(without_held_out(actual, 0.2, seed)[1]) == 2


@pytest.mark.parametrize(
    ("sets", "fraction", "words"),
    [
        ([["a"] * 5 + ["b"] * 5], 0.1, "holds out none, of 10 pairs with 2 prompts; raise it"),
        (
            [["a"] * 5],
            0.9,
            r"holds out every pair of \S+/0.jsonl, of 5 pairs with 1 prompts; lower it",
        ),
        (
            [["a"], ["a"] * 3 + ["b"]],
            0.9,
            r"holds out every pair of \S+/0.jsonl, of 5 pairs with 2 prompts; lower it",
        ),
    ],
)
def test_a_fraction_that_leaves_nothing_is_refused(
    tmp_path: Path, sets: list[list[str]], fraction: float, words: str
) -> None:
    with pytest.raises(UserError, match=rf"^data\.eval_fraction = {fraction}: {words}"):
        without_held_out(of_prompts(tmp_path, *sets), fraction, 7)


def test_held_out_rows_are_read_back(tmp_path: Path) -> None:
    data, actual = several(tmp_path, SETS, on_bad_row="drop", eval_fraction=0.3)
    _, held_out = without_held_out(actual, 0.3, 7)
    raw = raw_rows(data, "eval", held_out.pair_ids.tolist())
    assert list(raw) == held_out.pair_ids.tolist()
    assert {(row.source, row.number) for row in raw.values()} == {actual.place(i)[1:] for i in raw}


# --- weights and margins --------------------------------------------------------------------------

WEIGHED = [
    {**row, "w": weight, "m": -weight}
    for row, weight in zip(random_rows(3), (2.0, 0.5, 3.0), strict=True)
]


@pytest.mark.parametrize("columns", [["weight"], ["margin"], ["weight", "margin"]])
@pytest.mark.parametrize("parquet", [False, True])
def test_pairs_have_the_weights_and_margins_of_their_rows(
    tmp_path: Path, columns: list[str], parquet: bool
) -> None:
    import datasets

    content = [{**TIE, "w": None, "m": None}, *WEIGHED]
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_list(content).to_parquet(str(path))
    named = {f"{column}_column": column[0] for column in columns}
    source = str(path) if parquet else str(write_jsonl(tmp_path / "train.jsonl", content))
    data = data_spec(train=[source, source], **named)
    pairs = tokenized_pairs(data, "train", tokenizer(), tmp_path / "cache")
    expected = {"weight": [2.0, 0.5, 3.0] * 2, "margin": [-2.0, -0.5, -3.0] * 2}
    for column, values in (("weight", pairs.weights), ("margin", pairs.margins)):
        if column not in columns:
            assert values is None
            assert column not in pairs[0]
            continue
        assert values is not None
        assert (values.dtype, values.tolist()) == (np.float64, expected[column])
        assert [pairs[index][column] for index in range(6)] == expected[column]
        assert [row[column] for row in map(pairs.only(np.array([4, 1])).__getitem__, range(2))] == [
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
            "has no column 'm' (data.margin_column); its columns are 'prompt', 'chosen', "
            "'rejected', 'w'",
        ),
    ],
)
def test_a_row_without_a_usable_number_is_malformed(
    tmp_path: Path, column: str, change: dict[str, Any], words: str
) -> None:
    changed = {name: value for name, value in {**WEIGHED[1], **change}.items() if value is not GONE}
    content = [WEIGHED[0], changed, WEIGHED[2]]
    with pytest.raises(UserError, match=f"data.train row 2 = .*{re.escape(words)}"):
        pairs_of(tmp_path, content, **{f"{column}_column": column[0]})
    left = pairs_of(tmp_path, content, on_bad_row="drop", **{f"{column}_column": column[0]})
    assert left.pair_ids.tolist() == [1, 3]
    assert left.dropped == {"malformed rows": 1}


# --- the cache ------------------------------------------------------------------------------------


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
    content = [{**row, "w": 1} for row in random_rows(4)]
    pairs_of(tmp_path, content)
    pairs_of(tmp_path, content, **change)
    assert len(builds) == 1 + is_new


def test_the_cache_key_covers_the_arguments_of_the_chat_template(
    tmp_path: Path, builds: list[Path]
) -> None:
    for settings in (
        {},
        {"system_prompt": "a"},
        {"system_prompt": "b"},
        {"chat_template_kwargs": {"mood": "glad"}},
    ):
        pairs_of(tmp_path, random_rows(4, conversational=True), **settings)
    assert len(builds) == 4
    assert len(set(builds)) == 4


def test_other_content_or_another_tokenizer_is_another_cache(
    tmp_path: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs_of(tmp_path, random_rows(4))
    pairs_of(tmp_path, random_rows(4, seed=1))
    monkeypatch.setattr(tokenizer(), "chat_template", "{{ 'another' }}")
    pairs_of(tmp_path, random_rows(4))
    monkeypatch.undo()
    assert len(builds) == 3
    assert len(set(builds)) == 3


def test_a_build_that_fails_leaves_no_cache(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        pairs_of(tmp_path, [GOOD, MALFORMED])
    assert len(pairs_of(tmp_path, [GOOD, GOOD])) == 2


def test_several_processes_build_once(tmp_path: Path) -> None:
    folder, log = tmp_path / "cache" / "folder", tmp_path / "log"
    processes = [builder(folder, log, 0.5) for _ in range(3)]
    assert [process.wait(timeout=scaled_timeout(60)) for process in processes] == [0, 0, 0]
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
    content = random_rows(module.PARALLEL_FROM + 600, longest=4)
    content[700], content[2300] = MALFORMED, {**content[0], "chosen": content[0]["rejected"]}
    nested: Any = "deeper than pickle sends to another process"
    for _ in range(700):
        nested = [nested]
    content[1200] = {**content[0], "chosen": nested}
    values = []
    for processes in (1, 2):
        path = write_jsonl(tmp_path / "train.jsonl", content)
        data = data_spec(train=str(path), num_proc=processes, on_bad_row="drop")
        values.append(tokenized_pairs(data, "train", tokenizer(), tmp_path / f"cache {processes}"))
    folders = [next((tmp_path / f"cache {processes}" / "pairs").glob("*/")) for processes in (1, 2)]
    for name in ("tokens.npy", "lengths.npy", "rows.npy", "hashes.npy", "meta.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert values[1].dropped == {"malformed rows": 2, "ties": 1}
    assert values[1].pair_ids.tolist() == [
        i for i in range(1, len(content) + 1) if i not in (701, 1201, 2301)
    ]
    assert len(builds) == 2


def test_a_bad_row_met_by_another_process_is_named(tmp_path: Path) -> None:
    content = [*random_rows(module.PARALLEL_FROM + 10, longest=2), MALFORMED]
    with pytest.raises(UserError, match=f"data.train row {len(content)} "):
        pairs_of(tmp_path, content, num_proc=2)
