"""The order of data: every pair once, the same global batches at any world size, ranks alike in
cost and in number.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.order import (
    Order,
    Share,
    epoch_order,
    permutation,
)
from support.orders import WORLDS, orders


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
