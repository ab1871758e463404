"""Rows are tokenised once, however many processes ask; the pairs of several sets, a part held out,
weights.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data import pair_cache, tokenize_rows
from orchestrator.data.build_once import build_once
from orchestrator.data.pair_cache import tokenized_pairs
from orchestrator.settings.errors import UserError
from support.pair_sets import GOOD, MALFORMED, TIE
from support.timeouts import scaled_timeout
from support.tiny_parts import data_spec, pairs_of, tokenized, tokenizer
from support.tiny_settings import random_rows, write_jsonl

BUILDER = """
import os, sys, time
from pathlib import Path
from orchestrator.data.build_once import build_once
folder, log, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
def build(partial):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    (partial / f"by_{os.getpid()}").touch()
    time.sleep(seconds)
build_once(folder, build)
assert len(os.listdir(folder)) == 2  # and the checksums
"""


def builder(folder: Path, log: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", BUILDER, str(folder), str(log), str(seconds)])


# --- rows -----------------------------------------------------------------------------------------

GONE: Any = object()


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
    original = pair_cache._build

    def counting(folder: Path, **arguments: Any) -> None:
        folders.append(folder)
        original(folder, **arguments)

    monkeypatch.setattr(pair_cache, "_build", counting)
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
    assert not [path for path in tmp_path.rglob("*/pairs/*") if path.suffix != ".jsonl"]
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
    assert sorted(os.listdir(folder)) == [
        "checksums.json",
        "mine",
    ]  # nothing of what the killed one had begun


def test_many_processes_tokenise_as_one_does(tmp_path: Path, builds: list[Path]) -> None:
    content = random_rows(tokenize_rows.PARALLEL_FROM + 600, longest=4)
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
    content = [*random_rows(tokenize_rows.PARALLEL_FROM + 10, longest=2), MALFORMED]
    with pytest.raises(UserError, match=f"data.train row {len(content)} "):
        pairs_of(tmp_path, content, num_proc=2)
