"""Bind processes to the parent that started them, which they do not outlive."""

import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1
PARENT = "ORCHESTRATOR_PARENT"
"""Environment variable of a rank of `debug --nproc`: the process that started it."""


def dies_with_parent() -> Callable[[], None]:
    """Return a function that a child calls before exec: the kernel kills it when this process ends.

    Linux alone can do so; elsewhere the function does nothing.
    """
    parent = os.getpid()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # loaded before the fork

    def bind() -> None:
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # it died before the call
                os._exit(1)

    return bind


def handles_signals(pid: int) -> bool:
    """Return whether a process has a handler for SIGTERM, as a rank does once its run begins."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended, or this is not Linux
        return True
    mask = int(status.partition("\nSigCgt:")[2].split()[0], 16)
    return bool(mask >> (signal.SIGTERM - 1) & 1)
