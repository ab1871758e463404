"""A small model and an optimizer of the settings for it."""

from typing import Any

import torch
from torch import nn

from orchestrator.engines.optim import (
    optimizer_factory,
    param_groups,
)
from orchestrator.settings.optim import (
    OptimizerSpec,
)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def optimizer(**settings: Any) -> torch.optim.Optimizer:
    return optimizer_factory(OptimizerSpec(**settings))(param_groups(Small(), 0.1))
