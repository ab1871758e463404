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
    died_at: int | None = None  # the step in progress, if it is known


class Supervisor:
    """Counter of deaths since the last new checkpoint.

    A run that progresses between deaths is never given up, unless max_failures is 0. One that dies
    twice at one step is, as it would do so again: died_twice_at is that step.
    """

    def __init__(self, max_failures: int) -> None:
        self.max_failures = max_failures
        self.deaths = 0
        self.died_twice_at: int | None = None
        self._committed = -1
        self._died_at: int | None = None

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
            self._committed, self.deaths, self._died_at = attempt.newest_step, 0, None
        self.deaths += 1
        if attempt.died_at is not None and attempt.died_at == self._died_at:
            self.died_twice_at = attempt.died_at
            return "give up"
        self._died_at = attempt.died_at
        return "retry" if self.deaths <= self.max_failures else "give up"

    @property
    def backoff_s(self) -> float:
        """Return the seconds to wait before the next attempt."""
        return BACKOFF_S[min(self.deaths, len(BACKOFF_S)) - 1]
