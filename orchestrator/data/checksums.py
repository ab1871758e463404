"""Write the checksums of a cache folder, and check them in one process of each node."""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from orchestrator.data.file_lock import Poll, locked, no_poll
from orchestrator.durable import sha256_of, sync_folder, synced_sha256, write_atomically

NAME = "checksums.json"
TRUSTED_S = 600.0  # seconds for which the other processes of a node rely on a check
# a check is not published for a file that was changed so shortly before: it could change once more
# without another time
SETTLED_S = 2.0


def seal(folder: Path) -> None:
    """Flush every file of a folder to disk, and write their checksums beside them."""
    sums = {str(path.relative_to(folder)): synced_sha256(path) for path in _files(folder)}
    write_atomically(folder / NAME, json.dumps(sums))
    sync_folder(folder)


def damage(folder: Path, poll: Poll = no_poll) -> str | None:
    """Return which file of a sealed folder is damaged, and how; None if none is.

    The first process of a node that calls this reads all files, which may be gigabytes. Those that
    call it in the next TRUSTED_S rely on it, unless a file was changed.
    """
    try:
        files, began = _attributes(folder), time.time()
        with _published(folder, poll) as record:
            if record is not None and _vouches(record, files):
                return None
            complaint = _complaint(folder)
            newest = max((each[-1] for each in files), default=0) / 1e9
            if record is not None and complaint is None and newest < began - SETTLED_S:
                record.seek(0)
                record.truncate()
                record.write(json.dumps({"files": files, "at": began}))
            return complaint
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _complaint(folder: Path) -> str | None:
    """Compare every file of a folder with its checksum."""
    try:
        sums = json.loads((folder / NAME).read_text())
        expected = {str(name): str(value) for name, value in sums.items()}
    except FileNotFoundError:
        return f"{NAME} is missing"
    except (ValueError, AttributeError):
        return f"{NAME} is damaged"
    for name, value in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != value:
            return f"{name} differs from its checksum"
    return None if expected else f"{NAME} is damaged"


def _attributes(folder: Path) -> list[list[Any]]:
    """Return what tells whether a file was changed: name, inode, size and times of each."""
    stats = [(str(path), path.stat()) for path in _files(folder)]
    return [[name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats]


def _vouches(record: TextIO, files: list[list[Any]]) -> bool:
    """Return whether a process of this node has checked these very files a moment ago."""
    record.seek(0)
    with suppress(ValueError, KeyError, TypeError):
        last = json.loads(record.read())
        return last["files"] == files and 0 <= time.time() - last["at"] < TRUSTED_S
    return False


@contextmanager
def _published(folder: Path, poll: Poll) -> Iterator[TextIO | None]:
    """Yield the locked file that holds this node's last check of a folder; None if it cannot be
    written, and every process has to check.
    """
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    home = Path(tempfile.gettempdir()) / f"orchestrator-{os.getuid()}"
    with ExitStack() as held:
        record: TextIO | None = None
        with suppress(OSError):
            home.mkdir(mode=0o700, exist_ok=True)
            record = held.enter_context(locked(home / f"{name}.json", poll))
        yield record


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
