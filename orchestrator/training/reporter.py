"""Report a run to its callbacks: transformers' TrainerState, logs and totals."""

import time
from collections.abc import Sequence
from typing import Any

from orchestrator.data.order import Order
from orchestrator.dpo.step import StepOutput
from orchestrator.engines.base import StepResult
from orchestrator.training.callbacks.handler import Callbacks
from orchestrator.training.metrics import MetricSums, means
from orchestrator.training.progress import Progress
from orchestrator.training.running_range import RunningRanges
from orchestrator.world import World


class Reporter:
    """The metrics since the last log, and what callbacks see of the position in the run."""

    def __init__(
        self, progress: Progress, callbacks: Callbacks, order: Order, world: World
    ) -> None:
        self.progress, self.callbacks, self.order, self.world = progress, callbacks, order, world
        self.window = MetricSums(world)  # since the last log
        self.ranges = RunningRanges()
        self.last_update: StepResult | None = None
        self._start = (0.0, 0, 0)  # time, step and pairs when this process began to train

    @property
    def epoch(self) -> float:
        """Return the epochs trained so far."""
        return self.progress.pairs_seen / self.order.pairs_per_epoch

    def begin(self) -> None:
        """Start the clock, and show the position."""
        self._start = time.monotonic(), self.progress.step, self.progress.pairs_seen
        self.show_position()

    def show_position(self) -> None:
        """Show the position in the TrainerState."""
        state, tokens = self.callbacks.state, self.progress.tokens_seen
        state.global_step, state.epoch = self.progress.step, self.epoch
        state.num_input_tokens_seen = int(tokens)
        state.total_flos = 6.0 * self.order.cost.token * tokens  # the formula of transformers

    def add(self, outputs: Sequence[StepOutput]) -> None:
        """Add the micro-batches of a step, without waiting for the device."""
        for output in outputs:
            self.window.add(output.metric_sums)

    def log(self) -> None:
        """Report the metrics since the last log; one reduction."""
        totals = self.window.totals()
        loss, steps = totals[0]
        if not steps:
            return  # no step since the last log
        progress, logs = self.progress, means(totals)
        progress.losses_seen = progress.losses_seen[0] + loss, progress.losses_seen[1] + steps
        progress.tokens_seen += logs["num_tokens"]
        logs["num_tokens"] = progress.tokens_seen
        if self.last_update is not None:
            logs["grad_norm"] = float(self.last_update.grad_norm)
            logs["learning_rate"] = self.last_update.lr
        self.window.clear()
        self.show_position()
        self.report(logs)

    def report(self, logs: dict[str, Any]) -> dict[str, Any]:
        """Pass the logs and the epoch to the callbacks, and return them."""
        logs = {**logs, "epoch": self.epoch}
        if self.world.is_main:
            self.callbacks.state.log_history.append({**logs, "step": self.progress.step})
        self.callbacks.fire("on_log", logs=logs)
        return logs

    def report_totals(self) -> None:
        """Report transformers' totals at the end: the time of this process and the mean loss of the
        run.
        """
        began, step, pairs = self._start
        seconds = max(time.monotonic() - began, 1e-9)
        loss, count = self.progress.losses_seen
        self.report(
            {
                "train_runtime": seconds,
                "train_samples_per_second": (self.progress.pairs_seen - pairs) / seconds,
                "train_steps_per_second": (self.progress.step - step) / seconds,
                "total_flos": self.callbacks.state.total_flos,
                "train_loss": loss / (count or 1.0),
            }
        )
