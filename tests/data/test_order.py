"""The order of data: every pair once, the same global batches at any world size, ranks alike in
cost and in number.
"""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.order import (
    TOKENS,
    Integers,
    Order,
    PairCost,
    RunLength,
    Share,
    deal,
    deal_many,
    epoch_order,
    fed_lengths,
    permutation,
    run_length,
)
from orchestrator.settings.training import TrainingSpec

WORLDS = [1, 2, 3, 5, 8]


def lengths(pairs: int, seed: int = 0, longest: int = 40) -> Integers:
    return np.random.default_rng(seed).integers(1, longest, (pairs, 3))


def orders(
    world: int, pairs: int, batch: int, micro: int | None = 2, **settings: Any
) -> list[Order]:
    """The order as each rank of a world computes it."""
    token_lengths = settings.pop("lengths", None)
    token_lengths = lengths(pairs) if token_lengths is None else token_lengths
    return [Order(token_lengths, batch, rank, world, 7, micro, **settings) for rank in range(world)]


def seen(ranks: list[Order], pairs_seen: int) -> list[int]:
    """The pairs that the ranks of a world train on at a step, fillers left out."""
    plans = [order.plan(pairs_seen) for order in ranks]
    return sorted(
        int(i)
        for plan in plans
        for micro in plan.micro_batches
        if not micro.is_filler
        for i in micro.pairs
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((12, 42, 0), [5, 8, 10, 2, 0, 11, 7, 4, 3, 1, 6, 9]),
        ((12, 42, 1), [6, 2, 8, 1, 9, 11, 4, 0, 3, 10, 7, 5]),
        ((12, 43, 0), [1, 6, 2, 4, 8, 7, 11, 3, 5, 9, 10, 0]),
        ((8, 2**40, 3), [6, 2, 1, 4, 3, 7, 0, 5]),
    ],
)
def test_the_permutation_never_changes(
    arguments: tuple[int, int, int], expected: list[int]
) -> None:
    assert permutation(*arguments).tolist() == expected


@pytest.mark.parametrize("pairs", [1, 2, 1000, 65537])
def test_a_permutation_holds_every_pair_once(pairs: int) -> None:
    assert np.array_equal(np.sort(permutation(pairs, 3, 1)), np.arange(pairs))


def test_seed_and_epoch_change_the_permutation() -> None:
    values = {
        tuple(permutation(50, seed, epoch).tolist()) for seed in range(8) for epoch in range(8)
    }
    assert len(values) == 64


def test_a_permutation_looks_random() -> None:
    places = np.array([permutation(20, seed, 0) for seed in range(4000)])
    assert abs(places.mean(axis=0) - 9.5).max() < 0.6  # five standard errors
    assert abs(np.corrcoef(places[:, 0], places[:, 1])[0, 1] + 1 / 19) < 0.08


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("pairs", "batch"), [(96, 12), (97, 12), (50, 7), (5, 8), (30, 1)])
def test_every_pair_once_per_epoch(world: int, pairs: int, batch: int) -> None:
    ranks = orders(world, pairs, batch)
    for epoch in range(2):
        values = [i for start in range(0, pairs, batch) for i in seen(ranks, epoch * pairs + start)]
        assert sorted(values) == list(range(pairs))


@pytest.mark.parametrize("world", WORLDS)
def test_the_same_global_batches_at_any_world_size_and_from_any_position(world: int) -> None:
    alone, ranks = orders(1, 50, 8)[0], orders(world, 50, 8)
    for start in (0, 8, 13, 48, 49, 50, 58, 125):
        expected = alone.plan(start)
        assert seen(ranks, start) == sorted(expected.global_pairs.tolist())
        for order in ranks:
            plan = order.plan(start)
            assert np.array_equal(plan.global_pairs, expected.global_pairs)
            assert (plan.epoch, plan.pairs_seen) == (start // 50, start)


def test_a_global_batch_is_a_slice_of_the_epochs_permutation() -> None:
    order = orders(1, 50, 8)[0]
    assert order.plan(16).global_pairs.tolist() == permutation(50, 7, 0)[16:24].tolist()
    assert order.plan(13).global_pairs.tolist() == permutation(50, 7, 0)[13:21].tolist()
    assert order.plan(58).global_pairs.tolist() == permutation(50, 7, 1)[8:16].tolist()


def test_the_last_batch_of_an_epoch_is_smaller() -> None:
    order = orders(1, 50, 8)[0]
    assert [len(order.plan(start).global_pairs) for start in (40, 48, 50)] == [8, 2, 8]


# --- several training sets ------------------------------------------------------------------------

SETS = st.lists(
    st.builds(Share.of, st.integers(1, 30), st.floats(0.01, 4)), min_size=1, max_size=4
).map(tuple)


@pytest.mark.parametrize(
    ("pairs", "weight", "per_epoch"),
    [
        (100, 1.0, 100),
        (100, 0.125, 12),
        (100, 0.375, 38),
        (10, 2.5, 25),
        (100, 0.001, 1),
        (7, 1 / 7, 1),
        (0, 2.0, 0),
    ],
)
def test_a_weight_says_how_often_the_pairs_of_a_set_are_seen_in_an_epoch(
    pairs: int, weight: float, per_epoch: int
) -> None:
    assert Share.of(pairs, weight) == (pairs, per_epoch)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sets=SETS, seed=st.integers(0, 2**64 - 1), epochs=st.integers(1, 6))
def test_after_any_number_of_epochs_the_pairs_of_a_set_were_seen_equally_often(
    sets: tuple[Share, ...], seed: int, epochs: int
) -> None:
    bounds = np.cumsum([0, *(share.pairs for share in sets)])
    times = np.zeros(bounds[-1], np.int64)
    for epoch in range(epochs):
        actual = epoch_order(sets, seed, epoch)
        assert len(actual) == sum(share.per_epoch for share in sets)
        times += np.bincount(actual, minlength=len(times))
        for share, first, end in zip(sets, bounds, bounds[1:], strict=False):
            of_set = times[first:end]
            assert of_set.sum() == (epoch + 1) * share.per_epoch
            assert of_set.max() - of_set.min() <= 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 9),
)
def test_sets_of_weight_one_are_seen_in_the_order_of_a_single_set(
    sizes: list[int], seed: int, epoch: int
) -> None:
    actual = epoch_order(tuple(Share.of(size, 1.0) for size in sizes), seed, epoch)
    assert np.array_equal(actual, permutation(sum(sizes), seed, epoch))


def test_the_order_of_weighted_sets_never_changes() -> None:
    sets = Share.of(4, 1.5), Share.of(6, 0.5), Share.of(2, 1.0)
    values = [epoch_order(sets, 42, epoch).tolist() for epoch in range(2)]
    assert values == [[3, 9, 11, 2, 0, 8, 3, 2, 1, 5, 10], [4, 1, 7, 0, 10, 2, 0, 1, 11, 6, 3]]


def test_sets_alike_in_size_and_weight_are_gone_through_differently() -> None:
    first, second = np.split(np.sort(epoch_order((Share(1000, 100), Share(1000, 100)), 7, 0)), 2)
    assert len(np.intersect1d(first, second - 1000)) < 30  # 10 are expected


def test_the_sets_of_an_epoch_are_mixed() -> None:
    actual = epoch_order((Share(1000, 1000), Share(50, 500)), 7, 0)
    assert abs((actual[:750] >= 1000).sum() - 250) < 50


@pytest.mark.parametrize("world", WORLDS)
def test_weighted_sets_give_the_same_global_batches_at_any_world_size(world: int) -> None:
    sets = Share.of(30, 0.4), Share.of(20, 2.0)
    alone, ranks = orders(1, 50, 8, shares=sets)[0], orders(world, 50, 8, shares=sets)
    assert (alone.pairs, alone.pairs_per_epoch, alone.takes_each_once) == (50, 52, False)
    for epoch in range(2):
        values = []
        for start in range(52 * epoch, 52 * (epoch + 1), 8):
            plan = alone.plan(start)
            assert plan.epoch == epoch
            assert seen(ranks, start) == sorted(plan.global_pairs.tolist())
            values += plan.global_pairs.tolist()
        assert values == epoch_order(sets, 7, epoch).tolist()
    whole = [
        i for order in ranks for micro in order.whole() if not micro.is_filler for i in micro.pairs
    ]
    assert sorted(whole) == list(range(50))  # an evaluation, or what fills a cache


# --- micro-batches --------------------------------------------------------------------------------


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
        assert (
            ranks[0].costs[ranks[0].plan(start).global_pairs].max() <= carried.mean()
        )  # else nobody could balance it
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
    assert (
        peak < 4 * costs.nbytes
    )  # a word for the result and a few that are gone: never a table of pairs by ranks
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
    ranks = [
        Order(token_lengths, 8, rank, 8, 7, 4) for rank in range(8)
    ]  # more than MANY a rank: an evaluation
    values = [
        i
        for order in ranks
        for micro in order.whole()
        if not micro.is_filler
        for i in micro.pairs.tolist()
    ]
    assert sorted(values) == list(range(9000))
    assert len({len(order.whole()) for order in ranks}) == 1
