"""A step at a time from any position, prefetched in a thread that neither loses an error nor
outlives its use.
"""

import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.data.collate import CollateContext, PackedCollator, PreferenceCollator
from orchestrator.data.loader import Loader, StepBatches
from orchestrator.data.order import Order, fed_lengths
from orchestrator.data.pair_cache import tokenized_pairs
from orchestrator.data.pairs import Pairs
from orchestrator.data.user_collator import AdaptedCollator
from support.timeouts import scaled_timeout
from support.tiny_parts import PAD, both_layouts, collator, data_spec, tokenizer
from support.tiny_settings import random_rows, write_jsonl

COUNT = 21


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    folder = tmp_path_factory.mktemp("pairs")
    data = data_spec(train=str(write_jsonl(folder / "train.jsonl", random_rows(COUNT))))
    return tokenized_pairs(data, "train", tokenizer(), folder)


def loader(pairs: Pairs, rank: int = 0, world: int = 1, collator: Any = None) -> Loader:
    order = Order(pairs.lengths, 8, rank, world, 7, 3)
    return Loader(pairs, order, collator or PackedCollator(data_spec()))


def pair_ids(step: StepBatches) -> list[int]:
    return sorted(
        int(i) for batch in step.micro_batches for i in batch.pair_ids[batch.pair_weights > 0]
    )


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_steps_go_on_from_any_position(pairs: Pairs) -> None:
    whole = list(islice(loader(pairs).steps(0, 0), 6))
    assert [step.pairs_seen for step in whole] == [8, 16, 21, 29, 37, 42]
    assert [step.epoch for step in whole] == [0, 0, 0, 1, 1, 1]
    for done in range(1, 5):
        rest = list(islice(loader(pairs).steps(whole[done - 1].pairs_seen, done), 6 - done))
        assert [pair_ids(step) for step in rest] == [pair_ids(step) for step in whole[done:]]
        for left, right in zip(rest, whole[done:], strict=True):
            assert all(
                torch.equal(a.input_ids, b.input_ids)
                for a, b in zip(left[2], right[2], strict=True)
            )


def test_an_epoch_holds_every_row_once(pairs: Pairs) -> None:
    steps = list(islice(loader(pairs).steps(0, 0), 3))
    assert sorted(i for step in steps for i in pair_ids(step)) == list(range(1, COUNT + 1))


def test_counts_are_of_the_global_batch_on_every_rank(pairs: Pairs) -> None:
    # the last, smaller batch
    ranks = [next(loader(pairs, rank, 3).steps(16, 2)) for rank in range(3)]
    assert {step.counts.pairs for step in ranks} == {5}
    assert not any(step.are_local for step in ranks)
    scored = sum(batch.counts.chosen_tokens for step in ranks for batch in step.micro_batches)
    assert {step.counts.chosen_tokens for step in ranks} == {scored}
    assert sorted(i for step in ranks for i in pair_ids(step)) == pair_ids(
        next(loader(pairs).steps(16, 2))
    )


def test_an_evaluation_makes_every_row_once(pairs: Pairs) -> None:
    values: list[int] = []
    for rank in range(2):
        micro_batches, make = loader(pairs, rank, 2).whole(3)
        for micro in micro_batches:
            batch = make(micro)
            values += batch.pair_ids[batch.pair_weights > 0].tolist()
    assert sorted(values) == list(range(1, COUNT + 1))


def test_a_users_collator_runs_in_line_and_its_counts_are_local(pairs: Pairs) -> None:
    contexts: list[tuple[CollateContext, str]] = []
    ours = PreferenceCollator(PAD, data_spec())

    def collate(rows: list[Any], context: CollateContext) -> dict[str, torch.Tensor]:
        contexts.append((context, threading.current_thread().name))
        batch = ours(rows)
        mask = torch.zeros_like(batch.input_ids)
        mask.view(-1)[batch.completion_index + 1] = 1
        assert batch.attention_mask is not None
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "completion_mask": mask,
        }

    ranks = [loader(pairs, rank, 2, AdaptedCollator(collate, PAD)) for rank in range(2)]
    steps = [next(each.steps(8, 4)) for each in ranks]
    expected = next(loader(pairs).steps(8, 4)).counts
    assert all(step.are_local for step in steps)
    assert sum(step.counts.pairs for step in steps) == expected.pairs == 8
    assert sum(step.counts.chosen_tokens for step in steps) == expected.chosen_tokens
    lengths = [pairs.lengths[int(i)] for i in ranks[0].order.plan(8).global_pairs]
    tokens = sum(int(2 * prompt + chosen + rejected) for prompt, chosen, rejected in lengths)
    assert {context for context, _ in contexts} == {
        CollateContext(rank, 2, 5, 8, tokens) for rank in range(2)
    }
    assert {thread for _, thread in contexts} == {threading.current_thread().name}


@both_layouts
@pytest.mark.parametrize("prompt", [{}, {"prompt": ""}], ids=["prompts", "none"])
@pytest.mark.parametrize("max_length", [1, 16, 40])
def test_keep_end_counts_the_tokens_that_are_fed(
    tmp_path: Path, packed: bool, prompt: dict[str, str], max_length: int
) -> None:
    made_up = [{**row, **prompt} for row in random_rows(8)]
    train = str(write_jsonl(tmp_path / "train.jsonl", made_up))
    data = data_spec(train=train, max_length=max_length, truncation="keep_end")
    tokenized_set = tokenized_pairs(data, "train", tokenizer(), tmp_path)
    order = Order(fed_lengths(tokenized_set.lengths, data.keep_last), 8, 0, 1, 7, 8, packed=packed)
    step = next(
        Loader(
            tokenized_set, order, collator(packed, max_length=max_length, truncation="keep_end")
        ).steps(0, 0)
    )
    fed = sum(int(batch.sequence_tokens.sum()) for batch in step.micro_batches)
    assert (
        order.tokens.sum()
        == fed
        < int(tokenized_set.lengths.sum() + tokenized_set.lengths[:, 0].sum())
    )
    scored = [length for batch in step.micro_batches for length in batch.scored[::2]]
    assert step.counts == (8, sum(scored))


def test_our_collator_runs_ahead_by_a_little(pairs: Pairs) -> None:
    values: list[str] = []
    ours = PackedCollator(data_spec())

    class Counting(PackedCollator):
        def __call__(self, rows: list[Any], *, is_filler: bool = False) -> Any:
            values.append(threading.current_thread().name)
            return ours(rows, is_filler=is_filler)

    steps = loader(pairs, collator=Counting(data_spec())).steps(0, 0)
    next(steps)
    deadline = time.monotonic() + scaled_timeout(20)
    while len(values) < 11 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    assert set(values) == {"loader"}
    # micro-batches of the step taken, of two that are ready, of one in hand
    assert len(values) == 3 + 3 + 2 + 3
    steps.close()


def test_an_error_while_collating_is_raised_where_the_step_is_taken(pairs: Pairs) -> None:
    class Failing(PackedCollator):
        def __call__(self, rows: list[Any], *, is_filler: bool = False) -> Any:
            raise ValueError("cannot collate")

    with pytest.raises(ValueError, match="cannot collate"):
        next(loader(pairs, collator=Failing(data_spec())).steps(0, 0))


def test_the_thread_ends_with_its_use(pairs: Pairs) -> None:
    before = loader_threads()
    steps = loader(pairs).steps(0, 0)
    next(steps)
    [thread] = [thread for thread in loader_threads() if thread not in before]
    assert thread.daemon
    steps.close()
    thread.join(timeout=scaled_timeout(5))
    assert not thread.is_alive()
