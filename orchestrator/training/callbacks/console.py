"""Show progress: a bar with loss, accuracy, tokens/s and time left on a terminal, plain lines
elsewhere.
"""

import sys
import time
from typing import Any, ClassVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from orchestrator.callback_api import TrainerCallback
from orchestrator.training.metrics import EVALUATED
from orchestrator.training.result import evaluated_sets


class ConsoleCallback(TrainerCallback):
    """The progress of a run on the terminal.

    Plain lines are flushed at once, because pipes and log files read them.
    """

    progress: ClassVar[Progress | None] = None  # a class variable: a process has one terminal
    gives_way: ClassVar[bool] = False

    def __init__(self) -> None:
        self.console = Console(file=sys.stdout)
        self.task = TaskID(0)
        self._since = (time.monotonic(), 0, 0.0)  # time, step, tokens at the last log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = (time.monotonic(), state.global_step, 0.0)
        if state.global_step:
            self._say(f"resumed after step {state.global_step}")
        if self.console.is_terminal and not self.gives_way:
            bar = ConsoleCallback.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = bar.add_task(
                "train", total=state.max_steps, completed=state.global_step, facts=""
            )
            bar.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show_phase("train")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show_phase("evaluate")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
        for name, prefix in evaluated_sets(logs).items():
            of = f" of {name}" if name else ""
            self._say(
                f"evaluation{of} after step {state.global_step}: "
                f"{_facts(logs, prefix)}{_more(logs, prefix)}"
            )
        if "loss" not in logs:
            return
        now, step, tokens = time.monotonic(), state.global_step, float(logs.get("num_tokens", 0))
        then, step_then, tokens_then = self._since
        self._since = (now, step, tokens)
        per_step = (now - then) / max(step - step_then, 1)
        rate = (
            f", {(tokens - tokens_then) / max(now - then, 1e-9):,.0f} tokens/s"
            if tokens_then or not step_then
            else ""
        )
        facts = f"{_facts(logs, '')}{rate}"
        if self.progress:
            self.progress.update(self.task, facts=facts)
        else:
            self._say(
                f"step {step}/{state.max_steps}: {facts}, "
                f"{_duration((state.max_steps - step) * per_step)} left"
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._say(f"saved after step {state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._take_down()

    @classmethod
    def give_way(cls) -> None:
        """Print plain lines from now on, because a user types at this terminal: a bar would
        overwrite the prompt and hold back incomplete lines.
        """
        ConsoleCallback.gives_way = True
        cls._take_down()

    @classmethod
    def _take_down(cls) -> None:
        if cls.progress:
            cls.progress.stop()
            ConsoleCallback.progress = None

    def _show_phase(self, phase: str) -> None:
        if self.progress:
            self.progress.update(self.task, description=phase)

    def _say(self, line: str) -> None:
        if self.progress:
            self.progress.console.print(line, highlight=False)
        else:
            print(line, flush=True)


def _facts(logs: dict[str, Any], prefix: str) -> str:
    return (
        f"loss {logs[f'{prefix}loss']:.4f}, accuracy "
        f"{logs.get(f'{prefix}rewards/accuracies', 0):.3f}"
    )


def _more(logs: dict[str, Any], prefix: str) -> str:
    """Return the metrics of a user's compute_metrics as text."""
    names = [name.removeprefix(prefix) for name in logs if name.startswith(prefix)]
    return "".join(f", {name} {logs[prefix + name]:.4g}" for name in names if name not in EVALUATED)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
