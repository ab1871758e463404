"""metrics.jsonl: one line per step that logged or evaluated, each step once whatever happened in between."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from orchestrator.training.rundir import write_atomically


class JsonlCallback(TrainerCallback):
    """Writes what is logged at once, so that no committed checkpoint is ahead of this file; what a step logs and
    what it evaluates become one line.

    On resume the lines after the checkpoint's step are cut off, since those steps are about to happen again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._line: dict[str, Any] = {}  # the last one, which may still grow
        self._starts_at = 0  # its first byte in the file

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        # without a history nothing is resumed: even a line of step 0 is of an attempt that starts over
        kept = [line for line in lines if state.log_history and _step_of(line) <= state.global_step]
        write_atomically(self.path, "".join(f"{line}\n" for line in kept))
        self._line = json.loads(kept[-1]) if kept else {}
        self._starts_at = self.path.stat().st_size - len(kept[-1].encode()) - 1 if kept else 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
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
        return float("inf")  # half a line of a process that was killed
