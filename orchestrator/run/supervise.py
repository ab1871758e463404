"""Decide what to do after an attempt of a run ends; pure Python, tested without Ray."""

from dataclasses import dataclass
from typing import Literal

Next = Literal["done", "refuse", "retry", "give up"]

BACKOFF_S = (1.0, 5.0, 30.0)  # seconds before the first, second and every further retry in a row


@dataclass(frozen=True)
class Attempt:
    """Outcome of one fit()."""

    # failed: training cannot continue; died: anything unexpected
    outcome: Literal["ended", "refused", "failed", "died"]
    newest_step: int  # of the newest committed checkpoint, -1 without one


class Supervisor:
    """Counter of deaths since the last new checkpoint.

    A run that progresses between deaths is never given up, unless max_failures is 0.
    """

    def __init__(self, max_failures: int) -> None:
        self.max_failures = max_failures
        self.deaths = 0
        self._committed = -1

    def after(self, attempt: Attempt) -> Next:
        """Return what to do after an attempt.

        A failure of training itself is given up at once, as it would repeat.
        """
        if attempt.outcome == "ended":
            return "done"
        if attempt.outcome == "refused":
            return "refuse"
        if attempt.outcome == "failed":
            return "give up"
        if attempt.newest_step > self._committed:
            self._committed, self.deaths = attempt.newest_step, 0
        self.deaths += 1
        return "retry" if self.deaths <= self.max_failures else "give up"

    @property
    def backoff_s(self) -> float:
        """Return the seconds to wait before the next attempt."""
        return BACKOFF_S[min(self.deaths, len(BACKOFF_S)) - 1]
