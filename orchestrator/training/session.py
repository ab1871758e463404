"""Exchange heartbeats and stop requests between a run and the process that started it."""

import json
import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Protocol

from orchestrator.training.rundir import RunDir

# USR1: sent by Slurm before a job's time limit
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
HEARTBEAT_S = 1.0  # minimum interval in seconds between two writes of the heartbeat file


class Session(Protocol):
    """The interface of `worker.run` to its launcher. `LocalSession` serves every launcher; a trial
    (run/local/trial.py) has one that does nothing.
    """

    def heartbeat(self, step: int, phase: str) -> None:
        """Report that this rank is alive, and what it does. Cheap enough for every step."""
        ...

    def stop_requested(self) -> str | None:
        """Return why the run should save and stop, or None.

        The trainer makes the ranks agree on it.
        """
        ...


class LocalSession:
    """The session of every run: the file RUN_DIR/STOP requests a stop, and so do STOP_SIGNALS,
    where a second INT or TERM kills.

    Only a main thread receives signals: Ray's workers train in another one, and its driver turns
    signals into the file.
    """

    def __init__(self, run_dir: RunDir, rank: int) -> None:
        self.run_dir, self.rank = run_dir, rank
        self._received: list[int] = []
        self._last_beat = 0.0
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)

    def heartbeat(self, step: int, phase: str) -> None:
        now = time.monotonic()
        if now - self._last_beat < HEARTBEAT_S:
            return
        self._last_beat = now
        beat = {
            "step": step,
            "phase": phase,
            "time": time.time(),
            "pid": os.getpid(),
            "host": os.uname().nodename,
        }
        path = self.run_dir.heartbeat(self.rank)
        partial = path.with_suffix(".tmp")
        with suppress(OSError):  # the checkpoint reports a full disk
            partial.write_text(json.dumps(beat))  # no fsync: it need not survive a crash
            os.replace(partial, path)

    def stop_requested(self) -> str | None:
        if self._received:
            return f"received {signal.Signals(self._received[0]).name}"
        if self.rank != 0:
            return None
        try:
            return self.run_dir.stop.read_text().strip() or "RUN_DIR/STOP exists"
        except FileNotFoundError:
            return None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number in self._received and number != signal.SIGUSR1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._received.append(number)
