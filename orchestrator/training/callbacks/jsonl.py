"""Write metrics.jsonl: one line per step that logged or evaluated, once per step even if the run
was interrupted.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestrator.callback_api import TrainerCallback
from orchestrator.durable import write_atomically
from orchestrator.training.logged import damaged_line, lines_of, parsed_lines

logger = logging.getLogger(__name__)

UNKNOWN = -1  # size of a file that another process changed, or whose last write failed


class JsonlCallback(TrainerCallback):
    """Writer of metrics.jsonl. It writes at once, so that no committed checkpoint is ahead of the
    file; training and evaluation metrics of a step are one line.

    The file is a copy of TrainerState.log_history, which checkpoints hold. It is written as a whole
    when training begins (a resumed run repeats the later steps) and ends, and at the next log after
    a write that failed or damage from outside.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._line: dict[str, Any] = {}  # the last one, to which metrics may still be added
        self._starts_at = 0  # its first byte in the file
        self._size = UNKNOWN  # in bytes, after the last write
        self._is_reported = False  # that it cannot be written

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore(state.log_history)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        try:
            is_as_left = self.path.stat().st_size == self._size
        except OSError:
            is_as_left = False
        if not is_as_left:
            self._write_all(state.log_history)
            return
        if self._line.get("step") != state.global_step:
            self._line, self._starts_at = {"step": state.global_step}, self._size
        self._line |= logs or {}
        try:
            self._write_line()
        except OSError as error:
            self._report(error)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore(state.log_history)

    def _restore(self, history: Iterable[dict[str, Any]]) -> None:
        """Write the whole file, and name the lines that are damaged."""
        if damaged := parsed_lines(self.path)[1]:
            message = "%s; the file is written again from the history of the run"
            logger.warning(message, damaged_line(self.path, damaged))
        self._write_all(history)

    def _write_line(self) -> None:
        """Write the last line over itself."""
        self._size, text = UNKNOWN, json.dumps(self._line).encode() + b"\n"
        with open(self.path, "r+b") as file:
            file.seek(self._starts_at)
            file.write(text)
            file.truncate()
        self._size = self._starts_at + len(text)

    def _write_all(self, history: Iterable[dict[str, Any]]) -> None:
        """Write the whole file; if that fails, the next log tries again."""
        lines = lines_of(history)
        texts = [json.dumps(line) + "\n" for line in lines]
        self._size = UNKNOWN
        try:
            write_atomically(self.path, "".join(texts))
        except OSError as error:
            self._report(error)
            return
        self._line = lines[-1] if lines else {}
        self._size = sum(map(len, texts))
        self._starts_at = self._size - len(texts[-1]) if texts else 0
        self._is_reported = False

    def _report(self, error: OSError) -> None:
        if not self._is_reported:
            message = "%s cannot be written (%s); the next log tries again"
            logger.warning(message, self.path, error.strerror or error)
        self._is_reported = True
