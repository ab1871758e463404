"""Pairs that repeat or contradict each other, and evaluation pairs that are trained on, are
counted.
"""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.held_out import without_held_out
from orchestrator.data.pair_cache import tokenized_pairs
from orchestrator.data.pairs import Pairs
from orchestrator.data.repeats import contradictory, repeat_lines, repeated, trained_on
from support.tiny_parts import CHAT_ROW, data_spec, tokenizer
from support.tiny_settings import random_rows, write_jsonl

TEXT, CHAT = random_rows(6), random_rows(4, conversational=True)


def swapped(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def pairs_of(folder: Path, *sets: list[dict[str, Any]], **settings: Any) -> Pairs:
    paths = [
        str(write_jsonl(folder / f"{number}.jsonl", content)) for number, content in enumerate(sets)
    ]
    return tokenized_pairs(
        data_spec(train=paths, **settings), "train", tokenizer(), folder / "cache"
    )


@pytest.mark.parametrize("content", [TEXT, CHAT], ids=["text", "chat"])
def test_repeated_and_contradictory_pairs_are_counted_over_all_sets(
    tmp_path: Path, content: list[Any]
) -> None:
    pairs = pairs_of(
        tmp_path,
        content,
        [content[0], swapped(content[1]), swapped(content[1]), swapped(content[0])],
    )
    assert repeated(pairs) == 2  # the first pair, and what is swapped twice
    assert contradictory(pairs) == 2
    plain = pairs_of(tmp_path, content)
    assert (repeated(plain), contradictory(plain)) == (0, 0)
    assert list(repeat_lines(plain, {})) == []


def test_rows_that_become_the_same_tokens_repeat_each_other(tmp_path: Path) -> None:
    whole = {side: CHAT_ROW["prompt"] + CHAT_ROW[side] for side in ("chosen", "rejected")}
    pairs = pairs_of(tmp_path, [CHAT_ROW, whole, {**CHAT_ROW, "score": 1}])
    assert repeated(pairs) == 2
    cut = [{"prompt": "p", "chosen": "same 1", "rejected": end} for end in ("other 1", "other 2")]
    assert repeated(pairs_of(tmp_path, cut, max_completion_length=5)) == 1


def test_evaluation_pairs_that_are_trained_on_are_counted_by_set(tmp_path: Path) -> None:
    train, first, second = (
        pairs_of(tmp_path, content)
        for content in (TEXT, [*TEXT[:2], swapped(TEXT[2]), *random_rows(3, seed=5)], TEXT[:1])
    )
    assert trained_on(first, train) == 3
    assert list(repeat_lines(train, {"hard": first, "": second})) == [
        "hard evaluation pairs that are also training pairs: 3; evaluation pairs that are also "
        "training pairs: 1"
    ]


def test_pairs_that_are_held_out_by_prompt_are_not_trained_on(tmp_path: Path) -> None:
    train, held_out = without_held_out(pairs_of(tmp_path, [*TEXT, *TEXT]), 0.4, 7)
    assert repeated(train) + repeated(held_out) == 6
    assert trained_on(held_out, train) == 0
