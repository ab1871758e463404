"""Heed a stop in phases other than steps: tokenising, filling the reference cache, evaluation,
export.
"""

import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from orchestrator.data.file_lock import Poll
from orchestrator.settings.errors import StopRequested
from orchestrator.training.manifest import committed, step_of
from orchestrator.training.result import RunResult
from orchestrator.training.rundir import RunDir
from orchestrator.training.session import Session
from orchestrator.world import World

LOOK_S = 0.1  # shortest interval between two looks for a stop


def heeding(reason: Callable[[], str | None]) -> Poll:
    """Return a function that raises StopRequested once there is a reason, on this rank alone."""
    looked_at = float("-inf")

    def poll() -> None:
        nonlocal looked_at
        now = time.monotonic()
        if now - looked_at < LOOK_S:
            return
        looked_at = now
        if (why := reason()) is not None:
            raise StopRequested(why)

    return poll


class StopAgreement:
    """The agreement of all ranks to stop between two micro-batches, by one small reduction each.

    On a GPU its result is read one micro-batch later: the host does not wait for the device.
    """

    def __init__(self, world: World, session: Session) -> None:
        self.world, self.session = world, session
        self._coming: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []

    def check(self) -> None:
        """Exchange whether a rank should stop. Collective.

        Raises:
            StopRequested: on every rank, after the same micro-batch.
        """
        reason = self.session.stop_requested()
        if self._is_agreed(reason is not None):
            raise StopRequested(reason or "requested on another rank")

    def _is_agreed(self, stops: bool) -> bool:
        if self.world.size == 1:
            return stops
        flag = self.world.max(torch.full((1,), int(stops), device=self.world.device))
        event = torch.cuda.Event() if flag.is_cuda else None
        self._coming.append((flag.to("cpu", non_blocking=True), event))
        if event is not None:
            event.record()
            if len(self._coming) == 1:
                return False
        copied, event = self._coming.pop(0)
        if event is not None:
            event.synchronize()
        return bool(copied.item())


def stopped_before_training(run_dir: RunDir, reason: str) -> RunResult:
    """Return the result of a run that was stopped before its first step of this attempt: that of
    its newest checkpoint, if any.
    """
    newest = committed(run_dir.checkpoints)
    step, folder = (step_of(newest[0]), str(newest[0])) if newest else (0, "")
    return RunResult("stopped", reason, step, folder, None)


def write_stopped(run_dir: RunDir, reason: str) -> RunResult:
    """Write and return that result."""
    result = stopped_before_training(run_dir, reason)
    run_dir.write_result(asdict(result))
    return result
