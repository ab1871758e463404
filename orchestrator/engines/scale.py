"""The loss scale of fp16, the same for every engine, so that each can resume from another's
checkpoint.
"""

from typing import Any

import torch

START, GROWTH_INTERVAL = 2.0**16, 2000  # as in torch.amp.GradScaler


class LossScale:
    """A power of two that keeps small gradients out of fp16's underflow.

    Micikevicius et al. 2017, arXiv 1710.03740.

    It is halved by each overflow and doubled after GROWTH_INTERVAL steps without one; for other
    precisions it is 1.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.value = START if enabled else 1.0
        self.growth_interval = GROWTH_INTERVAL
        self.good_steps = 0  # since the scale last changed

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss to run backward from."""
        return loss * self.value if self.enabled else loss

    def update(self, applied: bool) -> None:
        """Update the scale after a step.

        applied: the gradient was finite, so the step was applied.
        """
        if not self.enabled:
            return
        self.good_steps += 1
        if not applied:
            self.value, self.good_steps = self.value / 2, 0
        elif self.good_steps == self.growth_interval:
            self.value, self.good_steps = self.value * 2, 0

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"value": self.value, "good_steps": self.good_steps} if self.enabled else {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint; if that run had no scale, keep the initial one."""
        if self.enabled and state:
            self.value, self.good_steps = state["value"], state["good_steps"]
