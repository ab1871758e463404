"""Rows become one PairBatch: packed, padded as TRL lays it out, and a user's dict as the same
thing.
"""

import random
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from orchestrator.data.collate import (
    AdaptedCollator,
    CollateContext,
    PackedCollator,
    PairBatch,
    PreferenceCollator,
    Segments,
)
from orchestrator.settings.base import UserCodeSpec
from orchestrator.settings.errors import UserError
from support.tiny_parts import PAD, both_layouts, collator, data_spec, pair_rows

EXAMPLE = [
    {"pair_id": 11, "prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"pair_id": 12, "prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11]},
]
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


def segments_of(batch: PairBatch) -> Segments:
    assert batch.segments is not None
    return batch.segments


def awkward_rows(seed: int, pairs: int = 12) -> list[dict[str, Any]]:
    """Rows over three tokens, so that completions begin alike or are alike; prompts may be
    empty.
    """
    draw = random.Random(seed)

    def some(low: int) -> list[int]:
        return draw.choices([1, 2, 3], k=draw.randint(low, 5))

    return [
        {"pair_id": number, "prompt_ids": some(0), "chosen_ids": some(1), "rejected_ids": some(1)}
        for number in range(pairs)
    ]


def test_the_packed_example_of_the_docstring() -> None:
    batch = PackedCollator(data_spec())(EXAMPLE)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 2, 3]]
    assert batch.attention_mask is None
    assert batch.completion_index.tolist() == [2, 3, 2, 7, 7, 9]
    assert batch.completion_labels.tolist() == [4, 5, 6, 9, 10, 11]
    assert batch.scored == (2, 1, 1, 2)
    assert batch.sequence_tokens.tolist() == [5, 3, 4, 4]
    assert batch.completion_tokens.tolist() == [2, 1, 1, 2]
    assert batch.pair_ids.tolist() == [11, 12]
    assert batch.pair_weights.tolist() == [1.0, 1.0]
    assert batch.ref_logps is None
    segments = segments_of(batch)
    assert segments.spans == ((0, 3, 5, 6, 2), (6, 8, 9, 11, 7))
    assert segments.scoring.tolist() == [2, 3, 7, 9]
    assert segments.query_bounds.tolist() == [0, 5, 6, 9, 11]
    assert segments.key_bounds.tolist() == [0, 5, 9, 12, 16]
    assert segments.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 6, 7, 9, 10]
    assert segments.own_key.tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11, 14, 15]
    assert (segments.shared.tolist(), segments.shared_key.tolist()) == (
        [0, 1, 2, 6, 7],
        [5, 6, 7, 12, 13],
    )
    assert segments.longest == (5, 5)
    assert segments.query_bounds.dtype == segments.key_bounds.dtype == torch.int32


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "input_ids", "index", "labels", "span"),
    [
        ([1, 2], [3], [3, 4], [1, 2, 3, 4], [1, 1, 2], [3, 3, 4], (0, 3, 3, 4, 1)),
        ([1, 2], [3, 4], [3], [1, 2, 3, 4], [1, 2, 1], [3, 4, 3], (0, 3, 4, 4, 1)),
        ([1, 2], [3, 4], [3, 5], [1, 2, 3, 4, 5], [1, 2, 1, 2], [3, 4, 3, 5], (0, 3, 4, 5, 1)),
        ([1, 2], [3], [3], [1, 2, 3], [1, 1], [3, 3], (0, 3, 3, 3, 1)),
        ([1], [2], [3], [1, 2, 3], [0, 0], [2, 3], (0, 1, 2, 3, 0)),
        ([], [1, 2], [3, 4, 5], [1, 2, 3, 4, 5], [0, 2, 3], [2, 4, 5], (0, 0, 2, 5, 0)),
        ([], [1], [2, 3], [1, 2, 3], [1], [3], (0, 0, 1, 3, 1)),  # a first token is not scored
        ([], [1], [2], [1, 2], [], [], (0, 0, 1, 2, 2)),
    ],
    ids=[
        "chosen begins rejected",
        "rejected begins chosen",
        "completions begin alike",
        "completions alike",
        "one token each",
        "no prompt",
        "only rejected is scored",
        "nothing is scored",
    ],
)
def test_a_common_beginning_is_stored_once(
    prompt: Any, chosen: Any, rejected: Any, input_ids: Any, index: Any, labels: Any, span: Any
) -> None:
    row = {"pair_id": 1, "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    batch = PackedCollator(data_spec())([row])
    assert batch.input_ids.tolist() == [input_ids]
    assert batch.completion_index.tolist() == index
    assert batch.completion_labels.tolist() == labels
    assert batch.completion_tokens.tolist() == [len(chosen), len(rejected)]
    assert segments_of(batch).spans == (span,)


@pytest.mark.parametrize(
    ("max_length", "input_ids", "positions", "labels"),
    [
        (5, [1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 3], [4, 5, 6]),
        (
            4,
            [2, 3, 4, 5, 1, 2, 3, 6],
            [0, 1, 2, 3, 0, 1, 2, 3],
            [4, 5, 6],
        ),  # cut apart, they share nothing
        (3, [3, 4, 5, 2, 3, 6], [0, 1, 2, 0, 1, 2], [4, 5, 6]),
        (2, [4, 5, 3, 6], [0, 1, 0, 1], [5, 6]),
    ],
)
def test_keep_end_cuts_each_packed_sequence_from_its_start(
    max_length: int, input_ids: Any, positions: Any, labels: Any
) -> None:
    batch = PackedCollator(data_spec(max_length=max_length, truncation="keep_end"))(EXAMPLE[:1])
    assert batch.input_ids.tolist() == [input_ids]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [positions]
    assert batch.completion_labels.tolist() == labels


@pytest.mark.parametrize(
    "cut", [{}, *({"max_length": n, "truncation": "keep_end"} for n in (1, 2, 4, 6))], ids=str
)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("is_filler", [False, True])
def test_both_layouts_hold_the_same_sequences_and_score_the_same_tokens(
    cut: dict[str, Any], seed: int, is_filler: bool
) -> None:
    packed, padded = (
        collator(kind, **cut)(awkward_rows(seed), is_filler=is_filler) for kind in (True, False)
    )
    for name in (
        "pair_ids",
        "pair_weights",
        "sequence_tokens",
        "completion_tokens",
        "completion_labels",
    ):
        assert torch.equal(getattr(packed, name), getattr(padded, name)), name
        assert getattr(packed, name).dtype == getattr(padded, name).dtype, name
    assert packed.scored == padded.scored
    assert packed.counts == padded.counts
    row, width = packed.input_ids[0], padded.input_ids.shape[1]
    spans = segments_of(packed).spans
    chosen = [row[span.start : span.rejected] for span in spans]
    rejected = [
        torch.cat([row[span.start : span.fork], row[span.rejected : span.stop]]) for span in spans
    ]
    for actual, ids, length in zip(
        chosen + rejected, padded.input_ids, padded.sequence_tokens, strict=True
    ):
        assert torch.equal(actual, ids[:length])
    assert packed.position_ids is not None
    assert torch.equal(
        row[packed.completion_index], padded.input_ids.flatten()[padded.completion_index]
    )
    assert torch.equal(
        packed.position_ids[0, packed.completion_index], padded.completion_index % width
    )


@pytest.mark.parametrize("seed", range(3))
def test_segments_let_each_token_see_its_own_sequence_up_to_itself(seed: int) -> None:
    batch = PackedCollator(data_spec())(awkward_rows(seed))
    spans, scoring, queries, keys, key_index, own_key, shared, shared_key, longest = segments_of(
        batch
    )
    tokens = batch.input_ids.shape[1]
    expected = torch.zeros(tokens, tokens, dtype=torch.bool)
    for start, fork, rejected, stop, scored in spans:
        expected[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
        expected[rejected:stop, fork:rejected] = False
        assert scored == min([int(i) for i in scoring if start <= i < stop], default=stop)
    actual = torch.zeros_like(expected)
    for run in range(2 * len(spans)):
        (first, last), (low, high) = queries[run : run + 2].tolist(), keys[run : run + 2].tolist()
        for query in range(first, last):  # a run is aligned with the end of its keys
            actual[query, key_index[low : high - (last - 1 - query)]] = True
    assert torch.equal(actual, expected)
    assert (queries[-1], keys[-1]) == (tokens, len(key_index))
    assert torch.equal(key_index[own_key], torch.arange(tokens))
    assert torch.equal(key_index[shared_key], shared)
    assert sorted([*own_key.tolist(), *shared_key.tolist()]) == list(range(len(key_index)))
    assert longest == (int(queries.diff().max()), int(keys.diff().max()))
    assert scoring.tolist() == sorted(set(batch.completion_index.tolist()))


def test_the_padded_example_of_the_docstring() -> None:
    batch = PreferenceCollator(0, data_spec())(EXAMPLE)
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 4, 5],
        [7, 8, 9, 0, 0],
        [1, 2, 3, 6, 0],
        [7, 8, 10, 11, 0],
    ]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [
        [1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
    ]
    assert batch.completion_index.tolist() == [2, 3, 12, 6, 16, 17]
    assert batch.completion_labels.tolist() == [4, 5, 6, 9, 10, 11]
    assert batch.scored == (2, 1, 1, 2)
    assert (batch.position_ids, batch.segments) == (None, None)
    assert batch.pair_ids.tolist() == [11, 12]
    assert batch.pair_weights.tolist() == [1.0, 1.0]
    assert batch.ref_logps is None


def test_the_pad_token_may_be_a_real_token() -> None:
    batch = PreferenceCollator(5, data_spec())(EXAMPLE)
    assert batch.input_ids[1].tolist() == [7, 8, 9, 5, 5]
    assert batch.attention_mask is not None
    assert batch.attention_mask[0].tolist() == [1] * 5


@both_layouts
def test_counts_leave_padding_and_fillers_out(packed: bool) -> None:
    collate = collator(packed)
    assert collate(EXAMPLE).counts == (2, 3)
    filler = collate(EXAMPLE[:1], is_filler=True)
    assert filler.pair_weights.tolist() == [0.0]
    assert filler.counts == (0, 0)
    assert filler.input_ids.shape == ((1, 6) if packed else (2, 5))


@pytest.mark.parametrize(
    ("max_length", "input_ids", "labels"),
    [
        (5, [[1, 2, 3, 4, 5], [1, 2, 3, 6, 0]], [4, 5, 6]),
        (4, [[2, 3, 4, 5], [1, 2, 3, 6]], [4, 5, 6]),
        (3, [[3, 4, 5], [2, 3, 6]], [4, 5, 6]),
        (2, [[4, 5], [3, 6]], [5, 6]),  # nothing stands before the 4 any more: it is not scored
    ],
)
def test_keep_end_cuts_each_sequence_from_its_start(
    max_length: int, input_ids: list[list[int]], labels: Any
) -> None:
    batch = PreferenceCollator(0, data_spec(max_length=max_length, truncation="keep_end"))(
        EXAMPLE[:1]
    )
    assert batch.input_ids.tolist() == input_ids
    assert batch.completion_labels.tolist() == labels


@both_layouts
def test_keep_start_was_done_when_the_rows_were_tokenised(packed: bool) -> None:
    assert collator(packed, max_length=2)(EXAMPLE).input_ids.shape == (
        (1, 11) if packed else (4, 5)
    )


@both_layouts
def test_a_batch_moves_whole(packed: bool) -> None:
    batch = collator(packed)(EXAMPLE)
    moved = batch.to(torch.device("meta"))
    assert moved.ref_logps is None
    assert moved.scored == batch.scored
    tensors = [
        value for value in (*moved, *(moved.segments or ())) if isinstance(value, torch.Tensor)
    ]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert len(tensors) == (15 if packed else 8)
    assert (moved.segments is not None) is packed


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
        r"'collate': raised KeyError: 'label' \(test_collate.py line \d+; step 5, rank 1, "
        r"pairs 11, 12\)"
    )
    with pytest.raises(UserError, match=line) as caught:
        AdaptedCollator(collate, PAD)(EXAMPLE, CONTEXT)
    assert caught.value.__cause__ is raised
    raised = OSError("the file system is gone")
    with pytest.raises(OSError, match="is gone"):
        AdaptedCollator(collate, PAD)(EXAMPLE, CONTEXT)


def test_an_exception_of_a_collator_names_pairs_whose_ids_it_removed() -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        for row in rows:
            del row["pair_id"]
        raise ValueError("no ids left")

    with pytest.raises(UserError, match=r"no ids left .*pairs 11, 12"):
        AdaptedCollator(collate, PAD)([dict(row) for row in EXAMPLE], CONTEXT)
