"""Exchange beats and stop requests between a run and the process that started it."""

import os
import signal
import threading
from types import FrameType
from typing import Protocol

import torch

from orchestrator.early_signals import stop_signals
from orchestrator.training.deaths import PlaceFile
from orchestrator.training.heartbeat import Phase
from orchestrator.training.rundir import RunDir
from orchestrator.training.watchdog import Watchdog


class Session(Protocol):
    """The interface of `worker.run` to its launcher. `LocalSession` serves every launcher; a trial
    (run/local/trial.py) has one that does nothing.
    """

    def beat(
        self, step: int, phase: Phase, index: int = 0, pairs: torch.Tensor | None = None
    ) -> None:
        """Report where this rank is. Cheap enough for every micro-batch.

        step: steps taken. index: of the micro-batch in the phase, from 1; 0: in no micro-batch.
        pairs: ids of the micro-batch that begins.
        """
        ...

    def fail(self, error: BaseException) -> None:
        """Report the exception that ends this rank."""
        ...

    def stop_requested(self, alone: bool = False) -> str | None:
        """Return why the run should save and stop, or None.

        The trainer makes the ranks agree on it. alone: this rank cannot rely on rank 0 to notice a
        file.
        """
        ...


class LocalSession:
    """The session of every run: the file RUN_DIR/STOP requests a stop, and so do stop signals,
    where a second INT or TERM kills.

    Only a main thread receives signals: Ray's workers train in another one, and its driver turns
    signals into the file.
    """

    def __init__(self, run_dir: RunDir, rank: int, watchdog: Watchdog | None = None) -> None:
        self.run_dir, self.rank, self.watchdog = run_dir, rank, watchdog
        self._place = PlaceFile(run_dir, rank)
        self._received: list[int] = []
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                signal.signal(number, self._on_signal)

    def beat(
        self, step: int, phase: Phase, index: int = 0, pairs: torch.Tensor | None = None
    ) -> None:
        self._place.move(step, phase, pairs)
        if self.watchdog is not None:
            self.watchdog.beat(step, phase, index)

    def fail(self, error: BaseException) -> None:
        self._place.fail(error)

    def stop_requested(self, alone: bool = False) -> str | None:
        if self._received:
            return f"received {signal.Signals(self._received[0]).name}"
        if self.rank != 0 and not alone:
            return None
        return self.run_dir.stop_reason()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number in self._received and number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._received.append(number)
