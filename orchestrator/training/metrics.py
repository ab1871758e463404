"""Named (sum, count) pairs on the device, in one flat vector, reduced over ranks once per log."""

import torch

from orchestrator.dpo.step import METRICS
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

    def restore(self, totals: list[list[float]]) -> None:
        """Go on with an interrupted window: its totals are sums over ranks already, so rank zero alone keeps them."""
        self.clear()
        if self.world.is_main:
            self.sums += torch.tensor(totals, dtype=torch.float64, device=self.world.device)


def means(totals: list[list[float]]) -> dict[str, float]:
    """Totals -> the mean of each metric by name; num_tokens stays a sum."""
    named = dict(zip(METRICS, totals, strict=True))
    return {name: sum_ if name == "num_tokens" else sum_ / max(count, 1.0) for name, (sum_, count) in named.items()}
