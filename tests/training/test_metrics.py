"""Sums and counts become means once, over all micro-batches and ranks, and an interrupted window goes on."""

from typing import Any

import pytest
import torch
from tiny import ALONE, on_ranks

from orchestrator.dpo.step import METRICS
from orchestrator.training.metrics import MetricSums, means
from orchestrator.world import World


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
    found = means(totals)
    assert tuple(found) == METRICS
    assert found.pop("num_tokens") == 500.0
    assert set(found.values()) == {1.5}
    assert METRICS[0] == "loss"


def test_nothing_counted_is_zero() -> None:
    assert set(means([[0.0, 0.0] for _ in METRICS]).values()) == {0.0}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_restored_window_is_counted_once(ranks: int) -> None:
    def work(world: World) -> Any:
        window = MetricSums(world)
        window.add(sums(9.0))
        window.restore(sums(1.0).tolist())
        window.add(sums(1.0))
        return window.totals()

    expected = [[(1.0 + ranks) * (i + 1), 2.0 + 2.0 * ranks] for i in range(len(METRICS))]
    assert on_ranks(ranks, work) == [expected] * ranks
