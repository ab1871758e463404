"""Take an exclusive lock on a file, polling, so that a process that waits can still be stopped."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

POLL_S = 0.1

Poll = Callable[[], None]
"""Called again and again during work that can take long; an exception that it raises ends it."""


def no_poll() -> None:
    """Let the work go on."""


@contextmanager
def locked(path: Path, poll: Poll = no_poll) -> Iterator[TextIO]:
    """Yield the file, locked. The lock ends with its process; its holder may delete the file."""
    while True:
        with open(path, "a+") as file:
            if _lock(file) and _is_at(path, file):
                yield file
                return
        poll()
        time.sleep(POLL_S)


def _lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, file: TextIO) -> bool:
    """Return whether the path is still this file: the last holder may have deleted it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
