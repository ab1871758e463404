"""Pairs of several sets keep their rows, weights and errors apart."""

from pathlib import Path

import numpy as np
import pytest

from orchestrator.data.order import Share
from orchestrator.data.pair_cache import tokenized_pairs
from orchestrator.data.sources import raw_rows, training_texts
from orchestrator.settings.errors import UserError
from support.pair_sets import GOOD, MALFORMED, SETS, TIE, several
from support.tiny_parts import CHAT_ROW, TEXT_ROW, data_spec, tokenizer
from support.tiny_settings import random_rows


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
