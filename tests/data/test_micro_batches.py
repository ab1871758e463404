"""Global batches are cut into micro-batches of equal cost on every rank."""

import tracemalloc
from typing import Any

import numpy as np
import pytest

from orchestrator.data.order import (
    TOKENS,
    Order,
    PairCost,
    RunLength,
    deal,
    deal_many,
    fed_lengths,
    run_length,
)
from orchestrator.settings.training import TrainingSpec
from support.orders import WORLDS, lengths, orders


@pytest.mark.parametrize("world", [*WORLDS, 16])
@pytest.mark.parametrize(
    "limit",
    [
        {"micro": 1},
        {"micro": 3},
        {"micro": None, "max_tokens": 200},
        {"micro": None, "max_tokens": 200, "packed": False},
        {"micro": 3, "max_tokens": 100},
    ],
    ids=str,
)
def test_every_rank_runs_as_many_micro_batches_and_fillers_only_where_needed(
    world: int, limit: dict[str, Any]
) -> None:
    ranks = orders(world, 50, 11, **limit)
    for start in (0, 44):
        per_rank = [order.plan(start).micro_batches for order in ranks]
        assert len({len(mine) for mine in per_rank}) == 1
        assert any(not any(micro.is_filler for micro in mine) for mine in per_rank)
        for mine in per_rank:
            assert [micro.is_filler for micro in mine] == sorted(micro.is_filler for micro in mine)
            assert all(len(micro.pairs) == 1 for micro in mine if micro.is_filler)


def test_more_ranks_than_pairs() -> None:
    per_rank = [order.plan(0).micro_batches for order in orders(8, 3, 3)]
    assert [len(mine) for mine in per_rank] == [1] * 8
    assert sum(not mine[0].is_filler for mine in per_rank) == 3


def test_a_filler_is_the_cheapest_pair_of_the_batch() -> None:
    ranks = orders(5, 50, 6, micro=1)
    fillers = [m for order in ranks for m in order.plan(0).micro_batches if m.is_filler]
    batch = ranks[0].plan(0).global_pairs
    assert len(fillers) == 4
    assert {int(m.pairs[0]) for m in fillers} == {int(batch[ranks[0].costs[batch].argmin()])}


@pytest.mark.parametrize("world", WORLDS)
def test_an_evaluation_sees_every_pair_once(world: int) -> None:
    ranks = orders(world, 37, 8)
    values = [
        i for order in ranks for micro in order.whole() if not micro.is_filler for i in micro.pairs
    ]
    assert sorted(values) == list(range(37))
    assert len({len(order.whole()) for order in ranks}) == 1


@pytest.mark.parametrize(("world", "batch"), [(2, 32), (8, 64), (5, 64)])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "cost", [TOKENS, PairCost(token=10_000, scored=30_000, seen=4)], ids=["tokens", "model"]
)
def test_skewed_lengths_are_balanced_over_ranks(
    world: int, batch: int, packed: bool, cost: PairCost
) -> None:
    skewed = np.exp(np.random.default_rng(1).normal(5, 1, (1024, 3))).astype(np.int64).clip(1, 1500)
    ranks = orders(world, 1024, batch, lengths=skewed, packed=packed, cost=cost)
    slowest = mean = 0.0
    for start in range(0, 1024, batch):
        carried = np.array(
            [
                sum(o.costs[m.pairs].sum() for m in o.plan(start).micro_batches if not m.is_filler)
                for o in ranks
            ]
        )
        # else nobody could balance it
        assert ranks[0].costs[ranks[0].plan(start).global_pairs].max() <= carried.mean()
        slowest, mean = slowest + carried.max(), mean + carried.mean()
    assert slowest <= 1.1 * mean


def test_the_tokens_of_a_pair_are_those_of_both_sequences_in_either_layout() -> None:
    for packed in (True, False):
        assert orders(1, 1, 1, lengths=np.array([[10, 3, 4]]), packed=packed)[
            0
        ].tokens.tolist() == [27]


@pytest.mark.parametrize(
    ("cost", "packed", "expected"),
    [
        (TOKENS, True, 17),
        (TOKENS, False, 27),  # the prompt twice
        (PairCost(token=0, scored=1), True, 7),
        (PairCost(token=0, scored=1), False, 7),
        (PairCost(token=0, seen=1), True, (13**2 + 14**2) // 2 - 10**2 // 2),
        (PairCost(token=0, seen=1), False, (13**2 + 14**2) // 2),
        (PairCost(100, 1000, 3), True, 1700 + 7000 + 3 * 132),
        (PairCost(100, 1000, 3), False, 2700 + 7000 + 3 * 182),
    ],
)
def test_pair_cost_counts_body_head_and_attention(
    cost: PairCost, packed: bool, expected: int
) -> None:
    assert cost.of(np.array([[10, 3, 4]]), packed).tolist() == [expected]
    assert orders(1, 1, 1, lengths=np.array([[10, 3, 4]]), packed=packed, cost=cost)[
        0
    ].costs.tolist() == [expected]


@pytest.mark.parametrize("packed", [True, False])
def test_attention_cost_counts_the_tokens_attended_to(packed: bool) -> None:
    prompt, chosen, rejected = 70, 110, 40
    tokens = prompt + chosen + rejected if packed else 2 * prompt + chosen + rejected
    branch = prompt + chosen
    sees = np.tri(tokens, dtype=bool)
    if packed:
        sees[branch:, prompt:branch] = False
    else:
        sees[branch:, :branch] = False
    [actual] = PairCost(token=0, seen=1).of(np.array([[prompt, chosen, rejected]]), packed)
    assert actual == pytest.approx(sees.sum(), rel=0.02)


def test_a_long_pair_is_balanced_by_what_its_attention_costs() -> None:
    actual = np.array([[300, 100, 100]] + [[60, 20, 20]] * 10)  # 500 tokens, and ten times 100

    def pairs_beside_the_long_one(cost: PairCost) -> int:
        [share] = [
            pairs
            for order in orders(2, 11, 11, micro=11, lengths=actual, cost=cost)
            if 0
            in (pairs := [int(i) for micro in order.plan(0).micro_batches for i in micro.pairs])
        ]
        return len(share) - 1

    assert pairs_beside_the_long_one(TOKENS) == 3
    assert pairs_beside_the_long_one(PairCost(token=0, seen=1)) == 0


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_the_token_budget_holds_except_for_a_pair_that_is_larger_alone(
    world: int, packed: bool
) -> None:
    budget = 80 if packed else 150
    alone, shared = [], []
    for order in orders(world, 200, 40, micro=None, max_tokens=budget, packed=packed):
        longest = order.lengths[:, 0] + order.lengths[:, 1:].max(axis=1)
        for start in range(0, 200, 40):
            for micro in order.plan(start).micro_batches:
                padded = 2 * len(micro.pairs) * longest[micro.pairs].max()
                fed = order.lengths[micro.pairs].sum() if packed else padded
                (shared if len(micro.pairs) > 1 else alone).append(fed)
    assert max(shared) <= budget  # some share a pass,
    assert max(alone) > budget  # and some are too large even alone


def test_both_limits_hold_together() -> None:
    [order] = orders(1, 50, 50, micro=3, max_tokens=120)
    sizes = [(len(m.pairs), order.lengths[m.pairs].sum()) for m in order.plan(0).micro_batches]
    assert sum(pairs for pairs, _ in sizes) == 50
    assert max(pairs for pairs, _ in sizes) == 3
    assert max(tokens for pairs, tokens in sizes if pairs > 1) <= 120
    assert {pairs for pairs, _ in sizes} == {1, 2, 3}


def test_micro_batches_hold_at_most_micro_batch_size_pairs() -> None:
    sizes = [
        len(m.pairs)
        for o in orders(3, 50, 20, micro=3)
        for m in o.plan(0).micro_batches
        if not m.is_filler
    ]
    assert sum(sizes) == 20
    assert max(sizes) == 3


@pytest.mark.parametrize(
    ("keep_last", "expected"),
    [
        (None, [[10, 3, 4], [2, 9, 1]]),
        (14, [[10, 3, 4], [2, 9, 1]]),
        (13, [[9, 4, 4], [2, 9, 1]]),  # one side loses a token of the prompt that the other keeps
        (5, [[1, 4, 4], [0, 5, 3]]),
        (2, [[0, 2, 2], [0, 2, 2]]),
    ],
)
def test_fed_lengths_are_those_after_truncation(
    keep_last: int | None, expected: list[list[int]]
) -> None:
    actual = fed_lengths(np.array([[10, 3, 4], [2, 9, 1]]), keep_last)
    assert actual.tolist() == expected


def test_dealing_gives_the_dearest_pair_left_to_the_lightest_rank() -> None:
    assert deal(np.array([[5, 9, 1, 7, 3, 3]]), 2).tolist() == [[1, 0, 1, 1, 0, 0]]
    assert deal(np.array([[2, 2, 2]]), 3).tolist() == [[0, 1, 2]]


def test_a_block_of_batches_is_dealt_as_each_batch_alone() -> None:
    costs = np.random.default_rng(2).integers(1, 900, (700, 6))
    assert np.array_equal(deal(costs, 400), np.concatenate([deal(row[None], 400) for row in costs]))


@pytest.mark.parametrize(("batches", "size"), [(500, 2000), (20_000, 50)])
def test_dealing_a_million_pairs_on_512_ranks_needs_memory_only_per_pair(
    batches: int, size: int
) -> None:
    costs = np.random.default_rng(3).integers(1, 4000, (batches, size))
    tracemalloc.start()
    owners = deal(costs, 512)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # a word for the result and a few that are gone: never a table of pairs by ranks
    assert peak < 4 * costs.nbytes
    for batch in range(0, batches, batches // 5):
        loads = np.bincount(owners[batch], costs[batch], 512)
        assert np.count_nonzero(loads) == min(size, 512)
        assert loads.max() <= loads.mean() + costs[batch].max()


@pytest.mark.parametrize(
    ("pairs", "batch", "training", "expected"),
    [
        (100, 10, {}, RunLength(1.0, 10, 100)),
        (100, 30, {}, RunLength(1.0, 4, 100)),
        (100, 30, {"epochs": 3}, RunLength(3.0, 12, 300)),
        (100, 30, {"epochs": 1.5}, RunLength(1.5, 6, 150)),
        (100, 30, {"epochs": 0.25}, RunLength(0.25, 1, 25)),
        (100, 30, {"max_steps": 4}, RunLength(1.0, 4, None)),
        (100, 30, {"max_steps": 6}, RunLength(1.6, 6, None)),
        (100, 30, {"max_steps": 8}, RunLength(2.0, 8, None)),
        (3, 8, {"max_steps": 2}, RunLength(2.0, 2, None)),
        (10, 4, {"epochs": 1.3}, RunLength(1.3, 4, 13)),
    ],
)
def test_run_length(pairs: int, batch: int, training: dict[str, Any], expected: RunLength) -> None:
    actual = run_length(pairs, batch, TrainingSpec(**training))
    assert actual == (pytest.approx(expected.epochs), expected.steps, expected.pairs)


def test_a_run_by_epochs_always_has_a_step() -> None:
    assert run_length(100, 10, TrainingSpec(epochs=0.001)).steps == 1


def test_very_many_pairs_are_dealt_evenly_at_once() -> None:
    costs = np.exp(np.random.default_rng(0).normal(6, 0.6, 20_000)).astype(np.int64)
    loads = np.bincount(deal_many(costs, 8), weights=costs)
    assert len(loads) == 8
    assert loads.max() / loads.mean() < 1.002
    token_lengths = lengths(9000)
    # more than MANY a rank: an evaluation
    ranks = [Order(token_lengths, 8, rank, 8, 7, 4) for rank in range(8)]
    values = [
        i
        for order in ranks
        for micro in order.whole()
        if not micro.is_filler
        for i in micro.pairs.tolist()
    ]
    assert sorted(values) == list(range(9000))
    assert len({len(order.whole()) for order in ranks}) == 1
