"""Log-probs, counts and settings for tests of losses."""

from typing import Any

import torch

from orchestrator.dpo.losses import LOSSES, PairTerms
from orchestrator.settings.loss import (
    DpoSpec,
    LossType,
)

LOGPS = torch.tensor([-10.0, -20.0, -7.0, -11.0, -18.0, -7.0], dtype=torch.float64)
REFERENCE = torch.tensor([-12.0, -19.0, -7.0, -10.0, -20.0, -7.0], dtype=torch.float64)
TOKENS = torch.tensor([4, 1, 3, 2, 5, 3])


EPSILON = 0.1


def spec(beta: float = 0.1, **settings: Any) -> DpoSpec:
    """With some label smoothing, which exo_pair cannot do without."""
    return DpoSpec(**{"beta": beta, "label_smoothing": EPSILON, **settings})


def of(name: LossType, **settings: Any) -> list[float]:
    return LOSSES[name](PairTerms.split(LOGPS, REFERENCE, TOKENS), spec(**settings)).tolist()
