"""A part of the pairs is held out by prompt."""

from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data.held_out import without_held_out
from orchestrator.data.pairs import Pairs
from orchestrator.data.sources import raw_rows
from orchestrator.settings.errors import UserError
from support.pair_sets import SETS, several


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
