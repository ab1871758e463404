"""Collators of a user: their context, their shapes, and one line for what they do wrong."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from orchestrator.data.collate import CollateContext, PairBatch, PreferenceCollator
from orchestrator.data.user_collator import AdaptedCollator
from orchestrator.settings.base import UserCodeSpec
from orchestrator.settings.errors import MachineError, UserError
from support.tiny_parts import PAD, data_spec, pair_rows
from support.token_pairs import EXAMPLE

CONTEXT = CollateContext(rank=1, world_size=3, step=5, global_pairs=16, global_tokens=400)


def trl_shaped(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a batch in the form of TRL's DataCollatorForPreference."""
    sequences = [
        (row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows
    ]
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    values = {
        name: torch.zeros(len(sequences), width, dtype=torch.long)
        for name in ("attention_mask", "completion_mask")
    }
    values["input_ids"] = torch.full((len(sequences), width), PAD)
    for i, (prompt, completion) in enumerate(sequences):
        length = len(prompt) + len(completion)
        values["input_ids"][i, :length] = torch.tensor(prompt + completion)
        values["attention_mask"][i, :length] = 1
        values["completion_mask"][i, len(prompt) : length] = 1
    return values


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("a_users_module")
    monkeypatch.setitem(sys.modules, "a_users_module", module)
    return module


def assert_same(one: PairBatch, other: PairBatch) -> None:
    for name, left, right in zip(PairBatch._fields, one, other, strict=True):
        if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
            assert torch.equal(left, right), name
            assert left.dtype == right.dtype, name
        else:
            assert left == right, name


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("is_filler", [False, True])
def test_a_batch_in_trls_form_equals_ours(seed: int, is_filler: bool) -> None:
    rows = pair_rows(5, seed)
    theirs = AdaptedCollator(trl_shaped, PAD)(rows, CONTEXT, is_filler=is_filler)
    assert_same(theirs, PreferenceCollator(PAD, data_spec())(rows, is_filler=is_filler))


def test_a_collator_with_a_parameter_context_gets_it() -> None:
    calls: list[Any] = []

    def plain(rows: list[Any]) -> dict[str, torch.Tensor]:
        calls.append(None)
        return trl_shaped(rows)

    class Aware:
        def __call__(self, rows: list[Any], *, context: CollateContext) -> dict[str, torch.Tensor]:
            calls.append(context)
            return trl_shaped(rows)

    values: list[Any] = [plain, Aware, Aware()]
    for each in values:
        AdaptedCollator(each, PAD)(EXAMPLE, CONTEXT)
    assert calls == [None, CONTEXT, CONTEXT]


def test_a_collator_is_made_with_its_arguments_and_the_tokenizers_padding(
    user_module: ModuleType,
) -> None:
    class Padding:
        def __init__(self, pad_token_id: int, multiple_of: int = 1) -> None:
            self.pad_token_id, self.multiple_of = pad_token_id, multiple_of

        def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
            return padded(rows, self.pad_token_id, self.multiple_of)

    def padded(rows: list[Any], pad_token_id: int, multiple_of: int) -> dict[str, torch.Tensor]:
        more = -trl_shaped(rows)["input_ids"].shape[1] % multiple_of
        fills = {"input_ids": pad_token_id}
        return {
            name: pad(value, (0, more), value=fills.get(name, 0))
            for name, value in trl_shaped(rows).items()
        }

    user_module.Padding, user_module.padded = Padding, padded

    def by_settings(name: str, **kwargs: Any) -> AdaptedCollator:
        return AdaptedCollator(UserCodeSpec(path=f"a_users_module:{name}", kwargs=kwargs), PAD)

    for collate, fed in (
        (AdaptedCollator(Padding, PAD), (5, PAD)),
        (by_settings("Padding"), (5, PAD)),
        (by_settings("Padding", multiple_of=4), (8, PAD)),
        (by_settings("Padding", multiple_of=4, pad_token_id=9), (8, 9)),
        (by_settings("padded", multiple_of=4, pad_token_id=9), (8, 9)),
    ):
        ids = collate(EXAMPLE, CONTEXT).input_ids
        assert (ids.shape[1], int(ids[1, -1])) == fed
    with pytest.raises(
        UserError, match=r"Padding': cannot be called \(.*'other'.*\{path, kwargs\}"
    ):
        by_settings("Padding", other=1)


def test_a_users_reference_log_probs_are_taken() -> None:
    known = {
        "ref_chosen_logps": torch.tensor([-1.5, -2.5]),
        "ref_rejected_logps": torch.tensor([-3.5, -4.5]),
    }
    batch = AdaptedCollator(lambda rows: trl_shaped(rows) | known, PAD)(EXAMPLE, CONTEXT)
    assert batch.ref_logps is not None
    assert batch.ref_logps.dtype == torch.float64
    assert batch.ref_logps.tolist() == [-1.5, -2.5, -3.5, -4.5]


@pytest.mark.parametrize(
    "broken",
    [
        "no mask",
        "half the rows",
        "a mask of another shape",
        "log-probs of one side twice",
        "an array",
        "no dict",
    ],
)
def test_a_wrong_shape_is_refused_and_shown(broken: str) -> None:
    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        columns = trl_shaped(rows[:1] if broken == "half the rows" else rows)
        if broken == "no mask":
            del columns["completion_mask"]
        if broken == "a mask of another shape":
            columns["completion_mask"] = columns["completion_mask"][:, 1:]
        if broken == "log-probs of one side twice":
            columns["ref_chosen_logps"] = columns["ref_rejected_logps"] = torch.zeros(4)
        if broken == "an array":
            columns["attention_mask"] = columns["attention_mask"].numpy()
        return list(columns.values()) if broken == "no dict" else columns

    with pytest.raises(
        UserError,
        match=r"data_collator = 'collate': returned .*for 2 pairs.*\[2 \* pairs, tokens\]",
    ):
        AdaptedCollator(collate, PAD)(EXAMPLE, CONTEXT)


@pytest.mark.parametrize(
    ("ids", "message"),
    [((-100, torch.int64), "int64 with minimum -100"), ((1, torch.float32), "float32")],
)
def test_values_that_are_not_token_ids_are_refused(
    ids: tuple[int, torch.dtype], message: str
) -> None:
    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        columns = trl_shaped(rows)
        return columns | {
            "input_ids": columns["input_ids"]
            .masked_fill(columns["attention_mask"] == 0, ids[0])
            .to(ids[1])
        }

    with pytest.raises(
        UserError, match=f"'collate': returned input_ids of torch.{message}.*; return integers of 0"
    ):
        AdaptedCollator(collate, PAD)(EXAMPLE, CONTEXT)


def test_a_collator_may_sort_its_rows_and_take_out_keys() -> None:
    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        rows.sort(key=lambda row: len(row["prompt_ids"]))
        columns = trl_shaped(rows)
        for row in rows:
            row.clear()
        return columns

    weighed = [
        {**row, "weight": weight, "margin": weight - 1}
        for row, weight in zip(EXAMPLE, (2.0, 3.0), strict=True)
    ]
    batch = AdaptedCollator(collate, PAD)(weighed, CONTEXT)
    assert (batch.pair_ids.tolist(), batch.pair_weights.tolist()) == ([12, 11], [3, 2])
    assert batch.margins is not None
    assert batch.margins.tolist() == [2, 1]


def test_an_exception_of_a_collator_is_one_line_unless_the_machine_caused_it() -> None:
    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        raise raised

    raised: Exception = KeyError("label")
    line = (
        r"'collate': raised KeyError: 'label' \(test_user_collators.py line \d+; step 5, rank 1, "
        r"pairs 11, 12\)"
    )
    with pytest.raises(UserError, match=line) as caught:
        AdaptedCollator(collate, PAD)(EXAMPLE, CONTEXT)
    assert caught.value.__cause__ is raised
    for raised in (OSError("the file system is gone"), MemoryError()):
        line = rf"raised {type(raised).__name__}.*\(test_user_collators.py line \d+; step 5"
        with pytest.raises(MachineError, match=line):
            AdaptedCollator(collate, PAD)(EXAMPLE, CONTEXT)


def test_an_exception_of_a_collator_names_pairs_whose_ids_it_removed() -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        for row in rows:
            del row["pair_id"]
        raise ValueError("no ids left")

    with pytest.raises(UserError, match=r"no ids left .*pairs 11, 12"):
        AdaptedCollator(collate, PAD)([dict(row) for row in EXAMPLE], CONTEXT)
