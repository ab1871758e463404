"""Rows become one PairBatch: packed, padded as TRL lays it out, and a user's dict as the same
thing.
"""

import random
from typing import Any

import pytest
import torch

from orchestrator.data.collate import PackedCollator, PairBatch, PreferenceCollator, Segments
from support.tiny_parts import both_layouts, collator, data_spec
from support.token_pairs import EXAMPLE


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
        # cut apart, they share nothing
        (4, [2, 3, 4, 5, 1, 2, 3, 6], [0, 1, 2, 3, 0, 1, 2, 3], [4, 5, 6]),
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
