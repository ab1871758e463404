"""Count the steps of an attempt, and their time, in its line of attempts.jsonl."""

import time
from typing import Any

from orchestrator.callback_api import TrainerCallback
from orchestrator.training.attempts import Record


class AttemptCallback(TrainerCallback):
    """Writer of the position and the time in steps. A step lasts from the end of the one before, or
    of an evaluation or save that followed it.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self._since = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        attempt = self.record.attempt
        attempt.first_step = attempt.last_step = state.global_step
        attempt.training = time.time()
        self._continue()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        self.record.add_step(state.global_step, now - self._since)
        self._since = now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._continue()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._continue()

    def _continue(self) -> None:
        self._since = time.monotonic()
        self.record.touch()
