"""End what is left of a Ray that this process started, also if this process is killed.

Ray's own daemons notice the death of the driver after up to a minute. This file is also the program
of the guardian, a process that imports nothing but the standard library.
"""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = "ORCHESTRATOR_RAY"
"""Environment variable of every process of a Ray that a run started: a token of that run."""
GRACE_S = 5.0
POLL_S = 0.2


@contextmanager
def guarded(grace_s: float = GRACE_S) -> Iterator[None]:
    """Mark the processes that are started inside; end those that outlive the block or this process.

    The guardian waits for the end of a pipe, whose other end only this process holds. Processes
    have grace_s to end by themselves.
    """
    before, token = os.environ.get(MARK), secrets.token_hex(16)
    guardian = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, token, str(grace_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a signal of the terminal does not reach it
    )
    assert guardian.stdin is not None
    os.environ[MARK] = token
    try:
        yield
    finally:
        if before is None:
            del os.environ[MARK]
        else:
            os.environ[MARK] = before
        guardian.stdin.close()
        guardian.wait()


def end_marked(token: str, grace_s: float) -> None:
    """Wait until no process has the token in its environment; kill those that take too long."""
    deadline = time.monotonic() + grace_s
    while pids := _marked(token):
        if time.monotonic() > deadline:
            for pid in pids:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)


def _marked(token: str) -> list[int]:
    """Return the processes of this user that were started with the token."""
    entry = f"{MARK}={token}".encode()
    pids = list[int]()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # of another user, or gone
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                pids.append(int(folder.name))
    return pids


if __name__ == "__main__":
    sys.stdin.read()
    end_marked(sys.argv[1], float(sys.argv[2]))
