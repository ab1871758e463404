"""The loss scale of fp16: one definition for every engine, so that any of them goes on from another's."""

from typing import Any

import torch

START, GROWTH_INTERVAL = 2.0**16, 2000  # those of torch.amp.GradScaler


class LossScale:
    """A power of two that keeps small gradients out of fp16's underflow. Micikevicius et al. 2017, arXiv 1710.03740.

    Halved by each overflow, doubled after GROWTH_INTERVAL steps in a row without; 1 for every other precision.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.value = START if enabled else 1.0
        self.growth_interval = GROWTH_INTERVAL
        self.good_steps = 0  # since the scale last changed

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """What to run backward from."""
        return loss * self.value if self.enabled else loss

    def update(self, applied: bool) -> None:
        """After each step: whether its gradient was finite, and so applied."""
        if not self.enabled:
            return
        self.good_steps += 1
        if not applied:
            self.value, self.good_steps = self.value / 2, 0
        elif self.good_steps == self.growth_interval:
            self.value, self.good_steps = self.value * 2, 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"value": self.value, "good_steps": self.good_steps} if self.enabled else {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from there; a run that had no scale starts with its own."""
        if self.enabled and state:
            self.value, self.good_steps = state["value"], state["good_steps"]
