"""Build a folder of the cache in exactly one process, without collectives, and again if a file of
it is damaged.

The first process that gets a file lock builds the folder, and the others poll for it, so no rank
waits in a collective whose time-out would kill the run.
"""

import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from orchestrator.data.checksums import damage, seal
from orchestrator.data.file_lock import Poll, locked, no_poll
from orchestrator.durable import sync_folder

logger = logging.getLogger(__name__)


def build_once(folder: Path, build: Callable[[Path], object], poll: Poll = no_poll) -> None:
    """Create a folder with `build(partial_folder)` in exactly one process; the other callers poll
    until it exists. One that differs from its checksums is built again.

    The lock is released when its holder dies, so the next process replaces a killed builder. poll:
    called while this process waits.
    """
    # before the lock: readers of the cache need no permission to write it
    if folder.exists() and damage(folder, poll) is None:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock, partial = folder.with_suffix(".lock"), folder.with_suffix(".partial")
    with locked(lock, poll):
        try:
            if folder.exists():
                if (complaint := damage(folder, poll)) is None:
                    return
                logger.warning("cache %s: %s; it is built again", folder, complaint)
            _remove(partial)
            partial.mkdir()
            build(partial)
            seal(partial)
            _move(partial, folder)
        finally:
            _remove(partial)
            lock.unlink(missing_ok=True)


def _move(partial: Path, folder: Path) -> None:
    """Put the new folder into the place of a damaged one, which may be open in other processes."""
    damaged = folder.with_suffix(".damaged")
    _remove(damaged)
    with suppress(FileNotFoundError):
        os.rename(folder, damaged)
    os.rename(partial, folder)
    sync_folder(folder.parent)
    _remove(damaged)


def _remove(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
