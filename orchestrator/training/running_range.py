"""Notice a loss or a gradient norm far outside the range of the steps before."""

import math
from collections.abc import Mapping
from typing import Any

KEPT = 100  # steps
ENOUGH = 20  # steps from which a spread can be estimated
# Factors between a value and the running median. In a run of few steps the spread is unknown.
FEW, LEAST, MOST = math.log(100), math.log(10), math.log(1000)
SPREADS = 10  # median absolute deviations, as multiples of sigma
SIGMA = 1.4826  # sigma of a normal distribution in median absolute deviations
QUIET = 20  # steps in range after which an incident is over


class RunningRange:
    """The median and spread of the last values of one number, on a scale that is logarithmic above
    a third of its first value, and linear below: a loss that converges to 0 has large ratios.

    Values outside the range do not become part of it.
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self.recent: list[float] = []  # on that scale

    def add(self, value: float) -> bool:
        """Add the value of a step, and return whether it is far outside the range."""
        if self.first is None:
            self.first = value
        if self.is_outside(value):
            return True
        self.recent = [*self.recent, math.asinh(value / self._unit)][-KEPT:]
        return False

    def is_outside(self, value: float) -> bool:
        """Return whether a value is far outside the range."""
        return bool(self.recent) and self._is_outside(math.asinh(value / self._unit))

    @property
    def median(self) -> float:
        """Return the median of the last values; NaN without any."""
        if not self.recent:
            return math.nan
        return math.sinh(_median(self.recent)) * self._unit

    @property
    def _unit(self) -> float:
        return 0.3 * abs(self.first or 0.0) or 1e-3

    def _is_outside(self, on_scale: float) -> bool:
        middle = _median(self.recent)
        distance = on_scale - middle if on_scale > 0 else middle - on_scale  # away from zero
        if distance <= LEAST:
            return False
        if len(self.recent) < ENOUGH:
            return distance > FEW
        spread = SIGMA * _median([abs(each - middle) for each in self.recent])
        return distance > min(SPREADS * spread, MOST)


class RunningRanges:
    """The running ranges of loss and gradient norm, the same on every rank."""

    def __init__(self) -> None:
        self.ranges = {"loss": RunningRange(), "gradient norm": RunningRange()}
        self.outside_at: int | None = None  # the last step outside

    def add(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Add a step. Return a description of its values if one is far outside its range, but once
        per incident: not again until QUIET steps were in range.
        """
        values = dict(zip(self.ranges, (loss, grad_norm), strict=True))
        outside = [name for name, value in values.items() if self.ranges[name].add(value)]
        if not outside:
            return None
        before, self.outside_at = self.outside_at, step
        if before is not None and step - before <= QUIET:
            return None
        return ", ".join(
            f"{name} {value:.4g} (running median {self.ranges[name].median:.4g}"
            f"{', far outside its range' if name in outside else ''})"
            for name, value in values.items()
        )

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        ranges = {name: [of.first, of.recent] for name, of in self.ranges.items()}
        return {"ranges": ranges, "outside_at": self.outside_at}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Restore a result of `state`; checkpoints of older versions have none."""
        if state is None:
            return
        for name, of in self.ranges.items():
            of.first, of.recent = state["ranges"][name]
        self.outside_at = state["outside_at"]


def _median(values: list[float]) -> float:
    """Return the upper median."""
    return sorted(values)[len(values) // 2]
