"""Profile some steps with torch's profiler and write a trace for Perfetto."""

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from orchestrator.callback_api import TrainerCallback


class ProfilerCallback(TrainerCallback):
    """A profiler of some steps, which writes a Chrome trace, on every rank to its own file."""

    def __init__(self, path: Path, first: int, last: int) -> None:
        """Profile the steps first to last, counted from 1, both included."""
        self.path, self.first, self.last = path, first, last
        self._profile: profile | None = None
        self._span: record_function | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step + 1
        if not self.first <= step <= self.last:
            return
        if self._profile is None:
            activities = [ProfilerActivity.CPU] + [
                ProfilerActivity.CUDA
            ] * torch.cuda.is_available()
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()
        self._end_span()  # if fp16 skipped a step
        self._span = record_function(f"step {step}")
        self._span.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end_span()
        if state.global_step == self.last:
            self._write(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end_span()
        self._write(state)  # if the run ends earlier

    def _end_span(self) -> None:
        if self._span is not None:
            self._span.__exit__(None, None, None)
            self._span = None

    def _write(self, state: Any) -> None:
        if self._profile is None:
            return
        profiled, self._profile = self._profile, None
        profiled.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        profiled.export_chrome_trace(str(self.path))
        steps = f"steps {self.first} to {min(self.last, state.global_step)}"
        print(f"trace of {steps}: {self.path}; open it at https://ui.perfetto.dev", flush=True)
