"""Rows become one PairBatch: ours as TRL lays it out, and a user's dict as the same thing."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import PAD, data_spec, pair_rows

from orchestrator.data.collate import AdaptedCollator, CollateContext, PairBatch, PreferenceCollator, user_attribute
from orchestrator.settings.spec import UserError

EXAMPLE = [
    {"pair_id": 11, "prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"pair_id": 12, "prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11]},
]
CONTEXT = CollateContext(rank=1, world_size=3, step=5, global_pairs=16, global_tokens=400)


def trl_shaped(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What TRL's DataCollatorForPreference makes."""
    sequences = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    made = {
        name: torch.zeros(len(sequences), width, dtype=torch.long) for name in ("attention_mask", "completion_mask")
    }
    made["input_ids"] = torch.full((len(sequences), width), PAD)
    for i, (prompt, completion) in enumerate(sequences):
        length = len(prompt) + len(completion)
        made["input_ids"][i, :length] = torch.tensor(prompt + completion)
        made["attention_mask"][i, :length] = 1
        made["completion_mask"][i, len(prompt) : length] = 1
    return made


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("a_users_module")
    monkeypatch.setitem(sys.modules, "a_users_module", module)
    return module


def assert_same(one: PairBatch, other: PairBatch) -> None:
    for name, left, right in zip(PairBatch._fields, one, other, strict=True):
        assert (left is None) == (right is None), name
        assert left is None or (torch.equal(left, right) and left.dtype == right.dtype), name


def test_the_example_of_the_docstring() -> None:
    batch = PreferenceCollator(0, data_spec())(EXAMPLE)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 0, 0], [1, 2, 3, 6, 0], [7, 8, 10, 11, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert batch.completion_index.tolist() == [2, 3, 6, 12, 16, 17]
    assert batch.completion_labels.tolist() == [4, 5, 9, 6, 10, 11]
    assert batch.completion_sequence.tolist() == [0, 0, 1, 2, 3, 3]
    assert batch.pair_ids.tolist() == [11, 12]
    assert batch.pair_weights.tolist() == [1.0, 1.0]
    assert batch.ref_logps is None


def test_the_pad_token_may_be_a_real_token() -> None:
    batch = PreferenceCollator(5, data_spec())(EXAMPLE)
    assert batch.input_ids[1].tolist() == [7, 8, 9, 5, 5]
    assert batch.attention_mask[0].tolist() == [1] * 5


def test_counts_leave_padding_and_fillers_out() -> None:
    collate = PreferenceCollator(0, data_spec())
    assert collate(EXAMPLE).counts == (2, 16)
    filler = collate(EXAMPLE[:1], is_filler=True)
    assert filler.pair_weights.tolist() == [0.0]
    assert filler.counts == (0, 0)
    assert filler.input_ids.shape == (2, 5)


@pytest.mark.parametrize(
    ("max_length", "input_ids", "labels"),
    [
        (5, [[1, 2, 3, 4, 5], [1, 2, 3, 6, 0]], [4, 5, 6]),
        (4, [[2, 3, 4, 5], [1, 2, 3, 6]], [4, 5, 6]),
        (3, [[3, 4, 5], [2, 3, 6]], [4, 5, 6]),
        (2, [[4, 5], [3, 6]], [5, 6]),  # nothing stands before the 4 any more: it is not scored
    ],
)
def test_keep_end_cuts_each_sequence_from_its_start(max_length: int, input_ids: list[list[int]], labels: Any) -> None:
    batch = PreferenceCollator(0, data_spec(max_length=max_length, truncation="keep_end"))(EXAMPLE[:1])
    assert batch.input_ids.tolist() == input_ids
    assert batch.completion_labels.tolist() == labels


def test_keep_start_was_done_when_the_rows_were_tokenised() -> None:
    assert PreferenceCollator(0, data_spec(max_length=2))(EXAMPLE).input_ids.shape == (4, 5)


def test_a_batch_moves_whole() -> None:
    batch = PreferenceCollator(0, data_spec())(EXAMPLE)
    moved = batch.to(torch.device("meta"))
    assert moved.ref_logps is None
    assert {t.device.type for t in moved if t is not None} == {"meta"}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("is_filler", [False, True])
def test_a_trl_shaped_dict_becomes_the_same_batch_as_ours(user_module: ModuleType, seed: int, is_filler: bool) -> None:
    user_module.collate = trl_shaped  # type: ignore[attr-defined]
    rows = pair_rows(5, seed)
    theirs = AdaptedCollator("a_users_module:collate")(rows, CONTEXT, is_filler=is_filler)
    assert_same(theirs, PreferenceCollator(PAD, data_spec())(rows, is_filler=is_filler))


def test_a_collator_with_a_parameter_context_gets_it(user_module: ModuleType) -> None:
    calls: list[Any] = []

    def plain(rows: list[Any]) -> dict[str, torch.Tensor]:
        calls.append(None)
        return trl_shaped(rows)

    class Aware:
        def __call__(self, rows: list[Any], *, context: CollateContext) -> dict[str, torch.Tensor]:
            calls.append(context)
            return trl_shaped(rows)

    user_module.plain, user_module.Aware, user_module.aware = plain, Aware, Aware()  # type: ignore[attr-defined]
    for name in ("plain", "Aware", "aware"):
        AdaptedCollator(f"a_users_module:{name}")(EXAMPLE, CONTEXT)
    assert calls == [None, CONTEXT, CONTEXT]


def test_a_users_reference_log_probs_are_taken(user_module: ModuleType) -> None:
    known = {"ref_chosen_logps": torch.tensor([-1.5, -2.5]), "ref_rejected_logps": torch.tensor([-3.5, -4.5])}
    user_module.both = lambda rows: trl_shaped(rows) | known  # type: ignore[attr-defined]
    batch = AdaptedCollator("a_users_module:both")(EXAMPLE, CONTEXT)
    assert batch.ref_logps is not None
    assert batch.ref_logps.dtype == torch.float64
    assert batch.ref_logps.tolist() == [-1.5, -2.5, -3.5, -4.5]


@pytest.mark.parametrize(
    "broken", ["no mask", "half the rows", "a mask of another shape", "log-probs of one side twice"]
)
def test_a_wrong_shape_is_refused_with_what_came(user_module: ModuleType, broken: str) -> None:
    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        made = trl_shaped(rows[:1] if broken == "half the rows" else rows)
        if broken == "no mask":
            del made["completion_mask"]
        if broken == "a mask of another shape":
            made["completion_mask"] = made["completion_mask"][:, 1:]
        if broken == "log-probs of one side twice":
            made["ref_chosen_logps"] = made["ref_rejected_logps"] = torch.zeros(4)
        return made

    user_module.collate = collate  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"returned .*for 2 pairs.*\[2 \* pairs, tokens\]"):
        AdaptedCollator("a_users_module:collate")(EXAMPLE, CONTEXT)


@pytest.mark.parametrize(
    ("path", "rule"),
    [("no_such_module:x", "cannot be imported"), ("orchestrator.data.collate:nothing", "has no nothing")],
)
def test_user_code_that_is_not_there_is_refused(path: str, rule: str) -> None:
    with pytest.raises(UserError, match=rule) as caught:
        user_attribute("callbacks", path)
    assert caught.value.key == "callbacks"
