"""Bind processes to the parent that started them, and ask Linux about others."""

import ctypes
import os
import signal
from pathlib import Path

PARENT = "ORCHESTRATOR_PARENT"
"""Environment variable of a rank of `debug --nproc`: the process that started it."""
PR_SET_PDEATHSIG = 1  # of prctl, in linux/prctl.h
PRCTL = getattr(ctypes.CDLL(None), "prctl", None)  # loaded here: between fork and exec is too late


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process, a child of `parent`, when that ends.

    Linux alone can do so; elsewhere the function does nothing.
    """
    if PRCTL is not None:
        PRCTL(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


def handles_signals(pid: int) -> bool:
    """Return whether a process has a handler for SIGTERM, as a rank does once its run begins."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended, or this is not Linux
        return True
    mask = int(status.partition("\nSigCgt:")[2].split()[0], 16)
    return bool(mask >> (signal.SIGTERM - 1) & 1)


def process_state(pid: int) -> str:
    """Return the state of a process of this machine (T: stopped, Z: ended, ...), as a letter of
    proc_pid_stat(5); empty if there is none.

    Raises:
        OSError: it cannot be read.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return text.rpartition(")")[2].split()[0]
