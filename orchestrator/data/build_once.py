"""Build a folder of the cache in exactly one process, without collectives.

The first process that gets a file lock builds the folder, and the others poll for it, so no rank
waits in a collective whose time-out would kill the run.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Create a folder with `build(partial_folder)` in exactly one process; the other callers poll
    until it exists.

    The lock is released when its holder dies, so the next process replaces a killed builder.
    """
    if folder.exists():
        return  # readers of the cache need no permission to write the lock
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        while not folder.exists():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
                continue
            if folder.exists():
                return
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            build(partial)
            os.rename(partial, folder)
