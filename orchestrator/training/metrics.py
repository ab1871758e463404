"""Accumulate metrics on the device as (sum, count), and reduce them over ranks once per log."""

import torch

from orchestrator.dpo.step import METRICS, TOKEN_METRICS
from orchestrator.world import World

# of an evaluation, as in transformers
TIMES = ("runtime", "samples_per_second", "steps_per_second")
EVALUATED = (*(name for name in METRICS if name != "num_tokens"), *TIMES)
"""Metrics of an evaluation, without the prefix eval_ or eval_NAME_."""


class MetricSums:
    """Sums of StepOutput.metric_sums on the device; adding to them never waits for the device."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.clear()

    def clear(self) -> None:
        """Start a new window."""
        self.sums = torch.zeros(len(METRICS), 2, dtype=torch.float64, device=self.world.device)

    def add(self, metric_sums: torch.Tensor) -> None:
        """Add one micro-batch. metric_sums: [len(METRICS), 2]."""
        self.sums += metric_sums

    def totals(self) -> list[list[float]]:
        """Return sums and counts over all ranks; one collective."""
        return self.world.sum(self.sums.clone()).tolist()

    def per_rank(self) -> list[list[list[float]]]:
        """Return the sums of every rank, for a checkpoint; one collective."""
        return self.world.gather(self.sums.tolist())

    def restore(self, per_rank: list[list[list[float]]]) -> None:
        """Continue an interrupted window: each rank with its own sums, so that the order of
        addition is the same; at another number of ranks, rank 0 with all.
        """
        self.clear()
        sums = torch.tensor(per_rank, dtype=torch.float64, device=self.world.device)
        if len(per_rank) == self.world.size:
            self.sums += sums[self.world.rank]
        elif self.world.is_main:
            self.sums += sums.sum(0)


def means(totals: list[list[float]]) -> dict[str, float]:
    """Return the mean of each metric by name; num_tokens stays a sum.

    Token metrics without a count are left out.
    """
    named = {
        name: total
        for name, total in zip(METRICS, totals, strict=True)
        if total[1] or name not in TOKEN_METRICS
    }
    return {
        name: sum_ if name == "num_tokens" else sum_ / (count or 1.0)
        for name, (sum_, count) in named.items()
    }
