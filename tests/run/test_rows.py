"""Rows are shown as batches hold them, with what truncation takes, and all lengths are counted."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data.collate import PackedCollator
from orchestrator.data.order import fed_lengths
from orchestrator.data.pair_cache import tokenized_pairs
from orchestrator.run.rows import (
    Part,
    ShownRow,
    as_json,
    as_lines,
    json_row,
    length_lines,
    lengths,
    row_lines,
    shown_rows,
)
from support.tiny_parts import EOS, data_spec, ids, tokenizer
from support.tiny_settings import random_rows, tiny_spec, write_jsonl

TEXT = {"prompt": "12345678", "chosen": "hijkl", "rejected": "vw"}
ODD = {"prompt": "Say it. \nNow:\n", "chosen": "yes\n", "rejected": "no\x1b[2J"}
CUTS: list[dict[str, Any]] = [
    {"max_length": None},
    {"max_length": 14},
    {"max_length": 14, "truncation": "keep_end"},
    {"max_length": 5, "truncation": "keep_end"},
    {"max_length": 14, "max_prompt_length": 9, "max_completion_length": 6},
    {"max_length": 40, "max_prompt_length": 20},
]


def shown(folder: Path, content: list[Any], **settings: Any) -> list[ShownRow]:
    data = data_spec(train=str(write_jsonl(folder / "train.jsonl", content)), **settings)
    return list(shown_rows(data, tokenizer(), len(content)))


def texts(side: Any) -> tuple[str, ...]:
    return tuple(part.text for part in side if isinstance(part, Part))


@pytest.mark.parametrize(
    ("settings", "chosen", "rejected"),
    [
        ({}, ("", "12345678", "hijkl<end>", ""), ("", "12345678", "vw<end>", "")),
        ({"max_length": 12}, ("", "12345678", "hijk", "l<end>"), ("", "12345678", "vw<end>", "")),
        (
            {"max_length": 9, "truncation": "keep_end"},
            ("12345", "678", "hijkl<end>", ""),
            ("12", "345678", "vw<end>", ""),
        ),
        (
            {"max_length": 3, "truncation": "keep_end"},
            ("12345678hij", "", "kl<end>", ""),
            ("12345678", "", "vw<end>", ""),
        ),
        (
            {
                "max_length": 4,
                "max_prompt_length": 3,
                "max_completion_length": 2,
                "truncation": "keep_end",
            },
            ("123456", "78", "hi", "jkl<end>"),
            ("123456", "78", "vw", "<end>"),
        ),
    ],
)
def test_truncated_tokens_are_shown(
    settings: dict[str, Any], chosen: tuple[str, ...], rejected: tuple[str, ...], tmp_path: Path
) -> None:
    (row,) = shown(tmp_path, [TEXT], **settings)
    assert row.dropped is None
    assert texts(row.chosen) == chosen
    assert texts(row.rejected) == rejected


@pytest.mark.parametrize("settings", CUTS, ids=str)
def test_shown_tokens_are_those_of_a_batch(settings: dict[str, Any], tmp_path: Path) -> None:
    content = [
        *random_rows(20, longest=4),
        {**TEXT, "prompt": ""},
        {**TEXT, "prompt": "p" * 60},
        {**TEXT, "chosen": "vw"},
    ]
    actual = shown(tmp_path, content, **settings)
    data = data_spec(train=str(tmp_path / "train.jsonl"), **settings)
    pairs = tokenized_pairs(data, "train", tokenizer(), tmp_path / "cache")

    assert [row.place.row for row in actual if row.dropped is None] == pairs.pair_ids.tolist()
    assert len(pairs) > 3
    for index, row in enumerate(row for row in actual if row.dropped is None):
        batch = PackedCollator(data)([pairs[index]])
        assert batch.segments is not None
        span, fed = batch.segments.spans[0], batch.input_ids[0].tolist()
        sequences = fed[: span.rejected], fed[: span.fork] + fed[span.rejected :]
        for side, sequence, scored in zip(
            (row.chosen, row.rejected), sequences, batch.scored, strict=True
        ):
            assert side is not None
            assert side.prompt.ids + side.completion.ids == sequence
            assert side.scored == scored


@pytest.mark.parametrize("settings", CUTS, ids=str)
def test_lengths_and_cuts_are_counted(settings: dict[str, Any], tmp_path: Path) -> None:
    # no ties when cut
    content = [
        {name: text.strip() for name, text in row.items()} for row in random_rows(40, longest=5)
    ]
    data = data_spec(train=str(write_jsonl(tmp_path / "train.jsonl", content)), **settings)
    (pairs,) = tokenized_pairs(data, "train", tokenizer(), tmp_path / "cache").sets
    uncut = pairs.uncut_lengths
    token_lengths = lengths(uncut, data, pairs.dropped, pairs.unread)
    json.dumps(token_lengths)

    assert token_lengths["rows"] == 40
    assert token_lengths["dropped"] == pairs.dropped
    for name, of in zip(("prompt", "chosen", "rejected"), uncut.T, strict=True):
        assert token_lengths["tokens"][name]["min"] == of.min()
        assert token_lengths["tokens"][name]["50%"] in of
        assert (of <= token_lengths["tokens"][name]["90%"]).mean() >= 0.9
        edges = token_lengths["histogram_edges"]
        counted = [int(((of >= low) & (of < high)).sum()) for low, high in pairwise(edges)]
        assert token_lengths["histogram"][name] == counted
        assert sum(counted) == 40
    assert (
        token_lengths["tokens"]["longer_sequence"]["max"]
        == (uncut[:, 0] + uncut[:, 1:].max(1)).max()
    )

    without = {**settings, "max_length": None}
    whole = data_spec(train=data.train, **without)
    before = tokenized_pairs(whole, "train", tokenizer(), tmp_path / "cache")
    after = tokenized_pairs(data, "train", tokenizer(), tmp_path / "cache")
    kept = np.isin(before.pair_ids, after.pair_ids)
    shorter = (
        fed_lengths(after.lengths, data.keep_last).sum(1) < before.lengths[kept].sum(1)
    ).sum()
    assert token_lengths["cut"]["max_length"] == shorter
    assert (
        token_lengths["cut"]["max_prompt_length"]
        == (uncut[:, 0] > settings.get("max_prompt_length", 999)).sum()
    )
    assert (
        token_lengths["cut"]["max_completion_length"]
        == (uncut[:, 1:].max(1) > settings.get("max_completion_length", 999)).sum()
    )


def test_one_row_is_printed_on_a_terminal(tmp_path: Path) -> None:
    (row,) = shown(tmp_path, [ODD], max_length=18)
    plain, coloured = (list(row_lines(row, tokenizer(), colour)) for colour in (False, True))
    assert plain == [
        f"row 1 of {tmp_path}/train.jsonl: tokens of prompt + completion: chosen 14 + 4, rejected "
        "14 + 4",
        "  prompt    Say it.␣⏎",
        "            Now:⏎",
        "  chosen    ⟦yes⏎⟧⟨cut 1: <end>⟩",
        "            it has no end token (<end>)",
        "  rejected  ⟦no\\x1b[⟧⟨cut 3: 2J<end>⟩",
        "            it has no end token (<end>)",
    ]
    assert [re.sub(r"\x1b\[\d*m", "", line) for line in coloured] == plain
    assert "\x1b[32myes" in coloured[3]
    assert "\x1b[31mno" in coloured[5]
    json.dumps(json_row(row))


def test_rows_of_all_kinds_on_a_terminal(tmp_path: Path) -> None:
    merging = {"prompt": "xa", "chosen": "b", "rejected": "c "}
    actual = shown(
        tmp_path, [merging, {**TEXT, "chosen": "vw"}, {**TEXT, "prompt": ""}, 5], max_length=20
    )
    lines = [
        line.replace(f" of {tmp_path}/train.jsonl", "")
        for row in actual
        for line in row_lines(row, tokenizer(), False)
    ]
    assert lines == [
        "row 1: tokens of prompt + completion: chosen 1 + 2, rejected 1 + 4",
        "  tokenised alone the prompt ends with 'a'; followed by a completion it does not, so "
        "the completion starts earlier",
        "  prompt    x",
        "  chosen    ⟦ab<end>⟧",
        "  rejected  ⟦ac <end>⟧",
        "row 2: dropped, ties: chosen equals rejected",
        "row 3: tokens of prompt + completion: chosen 0 + 6, rejected 0 + 3",
        "  prompt    ",
        "  chosen    ⟦hijkl<end>⟧",
        "            its first token has no predecessor and is not scored",
        "  rejected  ⟦vw<end>⟧",
        "            its first token has no predecessor and is not scored",
        "row 4: dropped, malformed rows: is of type int, not an object with chosen and rejected",
    ]


def test_unread_columns_and_repeated_rows_are_shown(tmp_path: Path) -> None:
    content = [{**row, "score": 1} for row in random_rows(6)]
    write_jsonl(tmp_path / "eval.jsonl", [*random_rows(2), *random_rows(2, seed=1)])
    write_jsonl(tmp_path / "train.jsonl", [*content, content[0]])
    spec = tiny_spec(tmp_path)
    shown_lines = list(as_lines(spec, 1, colour=False))
    assert shown_lines.count("columns not read: score") == 1
    assert (
        shown_lines[-1]
        == "training pairs that repeat an earlier one: 1; evaluation pairs that are also "
        "training pairs: 2"
    )
    actual = as_json(spec, 1)
    assert list(actual["repeats"].values()) == [1, 2]
    assert actual["lengths"]["data.train"]["unread_columns"] == {"score": 7}
    json.dumps(actual)


def test_a_users_collator_is_named(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, data={"collator": "support.user_collators:plain"})
    assert "data.collator support.user_collators:plain may lay them out differently" in as_lines(
        spec, 1, colour=False
    )


def test_special_tokens_are_bold_where_there_are_colours(tmp_path: Path) -> None:
    (row,) = shown(tmp_path, [{**TEXT, "prompt": "a<end>b"}])
    assert row.chosen is not None
    assert row.chosen.prompt.ids == [*ids("a"), EOS, *ids("b")]
    assert "a\x1b[1m<end>\x1b[22mb" in next(
        line for line in row_lines(row, tokenizer(), True) if "prompt  " in line
    )


def test_token_lengths_are_printed_on_a_terminal() -> None:
    uncut = np.array([[2, 1, 3], [4, 9, 1], [30, 1, 1], [3, 2, 2]])
    data = data_spec(max_length=20, max_completion_length=8)
    assert list(
        length_lines("data.train", lengths(uncut, data, {"ties": 1}, {"mood": 2}), data)
    ) == [
        "data.train: tokens of 4 rows before truncation",
        "                     min    50%    90%    99%    max   0 to 31",
        "prompt                 2      4     30     30     30    █▅            ▅",
        "chosen                 1      2      9      9      9   █▅  ▅",
        "rejected               1      2      3      3      3   ██",
        "longer sequence        5     13     31     31     31     █   ▅        ▅",
        "rows cut by data.max_completion_length=8: 1",
        "rows cut by data.max_length=20 (keep_start): 0",
        "rows dropped, ties: 1",
        "rows with mood, which the chat template does not read: 2",
    ]
