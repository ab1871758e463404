"""Named (sum, count) pairs on the device, in one flat vector, reduced over ranks once per log."""

import torch

from orchestrator.dpo.step import METRICS, TOKEN_METRICS
from orchestrator.world import World


class MetricSums:
    """Accumulates StepOutput.metric_sums without ever waiting for the device."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.clear()

    def clear(self) -> None:
        """Begin a new window."""
        self.sums = torch.zeros(len(METRICS), 2, dtype=torch.float64, device=self.world.device)

    def add(self, metric_sums: torch.Tensor) -> None:
        """Add one micro-batch. metric_sums: [len(METRICS), 2]."""
        self.sums += metric_sums

    def totals(self) -> list[list[float]]:
        """Sums and counts over all ranks; one collective, which every rank must enter."""
        return self.world.sum(self.sums.clone()).tolist()

    def per_rank(self) -> list[list[list[float]]]:
        """The sums of every rank, for a checkpoint; one collective."""
        return self.world.gather(self.sums.tolist())

    def restore(self, per_rank: list[list[list[float]]]) -> None:
        """Go on with an interrupted window: each rank with its own sums, so that they add up in the same order; at
        another number of ranks rank zero with all."""
        self.clear()
        sums = torch.tensor(per_rank, dtype=torch.float64, device=self.world.device)
        if len(per_rank) == self.world.size:
            self.sums += sums[self.world.rank]
        elif self.world.is_main:
            self.sums += sums.sum(0)


def means(totals: list[list[float]]) -> dict[str, float]:
    """Totals -> the mean of each metric by name; num_tokens stays a sum. What was switched off is left out."""
    named = {name: total for name, total in zip(METRICS, totals, strict=True) if total[1] or name not in TOKEN_METRICS}
    return {name: sum_ if name == "num_tokens" else sum_ / (count or 1.0) for name, (sum_, count) in named.items()}
