"""Choose the seconds between checkpoints from the cost of a save and the rate of failures."""

import math
import time
from collections.abc import Sequence

from orchestrator.training.attempts import Attempt

LONGEST_S = 3600.0  # at most an hour is lost, whatever the rate of failures
LEAST_COSTS = 10.0  # at most 9 % of the time is spent in saves
SMOOTHING = 0.5  # weight of the newest save in the cost
CHANGE = 1.5  # an interval that changed by this factor is printed


def seconds_between_saves(cost_s: float, mtbf_s: float) -> float:
    """Return Young's interval, sqrt(2 x cost x MTBF): longer ones lose more work at a failure,
    shorter ones spend more time in saves. It is at least 10 costs, at most an hour.
    """
    return max(LEAST_COSTS * cost_s, min(LONGEST_S, math.sqrt(2 * cost_s * mtbf_s)))


def hours_between_failures(
    mtbf_hours: float, nodes: int, failures: int = 0, node_hours: float = 0
) -> float:
    """Return the expected hours between failures of a run.

    mtbf_hours: of one node, as assumed before the run: it counts like one failure in that time.
    failures, node_hours: observed in the run.
    """
    return (mtbf_hours + node_hours) / ((1 + failures) * nodes)


def explained(cost_s: float, hours: float) -> str:
    """Return the arithmetic of an interval as text."""
    seconds = seconds_between_saves(cost_s, hours * 3600)
    between = f"{hours:.3g}" if hours < 1000 else f"{hours:,.0f}"
    root = f"sqrt(2 x {cost_s:.3g} s for a save x {between} h between failures)"
    bound = ""
    if seconds == LONGEST_S:
        bound = ", at most 1 h"
    elif seconds == LEAST_COSTS * cost_s:
        bound = ", at least 10 times a save"
    return f"{duration(seconds)} = {root}{bound}"


def duration(seconds: float) -> str:
    """Return a duration in the unit that suits it."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


class SaveInterval:
    """The seconds between checkpoints with checkpoint.every=auto; on rank 0 only."""

    def __init__(self, mtbf_hours: float, attempts: Sequence[Attempt]) -> None:
        """Initialise the interval. attempts: of the run, up to the present one."""
        self.mtbf_hours, self.attempts = mtbf_hours, list(attempts)
        self.cost_s: float | None = None  # seconds that training waits for a save
        self._since = time.monotonic()  # the last save
        self._printed = 0.0

    def saved(self, cost_s: float) -> None:
        """Count a save that has just ended, or has been left to the background."""
        known = cost_s if self.cost_s is None else self.cost_s
        self.cost_s = known + SMOOTHING * (cost_s - known)
        self._since = time.monotonic()
        if not 1 / CHANGE < self.seconds / (self._printed or math.inf) < CHANGE:
            self._printed = self.seconds
            print(f"a checkpoint every {explained(self.cost_s, self._hours)}", flush=True)

    def is_due(self) -> bool:
        """Return whether to save now: at once if the cost is not known yet."""
        return self.cost_s is None or time.monotonic() - self._since >= self.seconds

    @property
    def seconds(self) -> float:
        """Return the interval, as far as its terms are known."""
        return seconds_between_saves(self.cost_s or 0.0, self._hours * 3600)

    @property
    def _hours(self) -> float:
        *before, present = self.attempts or [Attempt(time.time(), time.time(), 1, 1)]
        failures = sum(attempt.failed for attempt in before)
        seconds = sum(attempt.nodes * (attempt.seen - attempt.began) for attempt in before)
        seconds += present.nodes * (time.time() - present.began)
        return hours_between_failures(
            self.mtbf_hours, max(present.nodes, 1), failures, max(seconds, 0.0) / 3600
        )
