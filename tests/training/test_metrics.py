"""Sums and counts become means once, over all micro-batches and ranks, and an interrupted window
goes on.
"""

from typing import Any

import pytest
import torch

from orchestrator.dpo.step import METRICS, TOKEN_METRICS
from orchestrator.training.metrics import MetricSums, means
from orchestrator.world import World
from support.thread_ranks import on_ranks
from support.tiny_parts import ALONE


def sums(scale: float) -> torch.Tensor:
    values = torch.arange(1.0, len(METRICS) + 1, dtype=torch.float64)
    return torch.stack([scale * values, torch.full_like(values, 2.0)], dim=1)


def test_sums_and_counts_add_up() -> None:
    window = MetricSums(ALONE)
    window.add(sums(1.0))
    window.add(sums(3.0))
    totals = window.totals()
    assert totals == [[4.0 * (i + 1), 4.0] for i in range(len(METRICS))]
    assert window.totals() == totals  # reading does not empty the window
    window.clear()
    assert window.totals() == [[0.0, 0.0]] * len(METRICS)


def test_means_divide_by_counts_and_tokens_stay_a_sum() -> None:
    totals = [[6.0, 4.0] for _ in METRICS]
    totals[METRICS.index("num_tokens")] = [500.0, 7.0]
    metrics = means(totals)
    assert tuple(metrics) == METRICS
    assert metrics.pop("num_tokens") == 500.0
    assert set(metrics.values()) == {1.5}
    assert METRICS[0] == "loss"


def test_nothing_counted_is_zero_and_what_was_switched_off_is_left_out() -> None:
    metrics = means([[0.0, 0.0] for _ in METRICS])
    assert set(metrics) == set(METRICS) - set(TOKEN_METRICS)
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("ranks_before", [1, 2, 3])
def test_a_restored_window_is_counted_once(ranks: int, ranks_before: int) -> None:
    def work(world: World) -> Any:
        window = MetricSums(world)
        window.add(sums(9.0))
        window.restore([sums(1.0).tolist()] * ranks_before)
        window.add(sums(1.0))
        return window.totals()

    expected = [
        [(ranks_before + ranks) * (i + 1.0), 2.0 * (ranks_before + ranks)]
        for i in range(len(METRICS))
    ]
    assert on_ranks(ranks, work) == [expected] * ranks


def test_at_the_same_number_of_ranks_each_goes_on_with_its_own_sums() -> None:
    """Their order of summation is then that of an undisturbed run."""

    def work(world: World) -> Any:
        window = MetricSums(world)
        window.add(sums(float(world.rank + 1)))
        restored = MetricSums(world)
        restored.restore(window.per_rank())
        return torch.equal(restored.sums, window.sums)

    assert on_ranks(3, work) == [True] * 3
