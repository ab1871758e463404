"""Write metrics.jsonl: one line per step that logged or evaluated, once per step even if the run
was interrupted.
"""

import json
from pathlib import Path
from typing import Any

from orchestrator.callback_api import TrainerCallback
from orchestrator.training.rundir import write_atomically


class JsonlCallback(TrainerCallback):
    """Writer of metrics.jsonl. It writes at once, so that no committed checkpoint is ahead of the
    file; training and evaluation metrics of a step are one line.

    On resume, lines after the checkpoint's step are removed, because those steps are repeated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._line: dict[str, Any] = {}  # the last one, to which metrics may still be added
        self._starts_at = 0  # its first byte in the file

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        # without a history the run starts over: even a line of step 0 is from an earlier attempt
        kept = [line for line in lines if state.log_history and _step_of(line) <= state.global_step]
        write_atomically(self.path, "".join(f"{line}\n" for line in kept))
        self._line = json.loads(kept[-1]) if kept else {}
        self._starts_at = self.path.stat().st_size - len(kept[-1].encode()) - 1 if kept else 0

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if self._line.get("step") != state.global_step:
            self._line, self._starts_at = {"step": state.global_step}, self.path.stat().st_size
        self._line |= logs or {}
        with open(self.path, "r+") as file:
            file.seek(self._starts_at)
            file.write(json.dumps(self._line) + "\n")
            file.truncate()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # an incomplete line of a killed process
