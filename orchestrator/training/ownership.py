"""Own a run directory: by a lock, and by beats for hosts whose file system does not pass locks."""

import fcntl
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from orchestrator.processes import process_state
from orchestrator.settings.errors import UserError

BEAT_S = 1.0  # an owner rewrites its file this often
STALE_S = 10.0  # an owner is dead whose file has not changed for so long
RETURN_S = 3.0  # an owner rewrites a file that somebody has deleted within this time
POLL_S = 0.1
FREE = "free"  # content of the file after an owner has ended
WIDTH = 256  # bytes of a record: one short write, of the same length every time
TOKEN = "ORCHESTRATOR_RUN_DIR_IS_OWNED"
"""Environment variable of a process and its ranks: the token of the owner that started them."""


_ENDING = threading.Lock()


class Owner(NamedTuple):
    """The process that owns a run directory."""

    pid: int
    host: str
    boot: str  # of the kernel: processes with the same one see each other's locks
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def record(self, beat: int) -> bytes:
        """Return the content of the file after so many beats."""
        text = json.dumps({**self._asdict(), "beat": beat})
        return f"{text:<{WIDTH - 1}}\n".encode()

    @property
    def is_gone(self) -> bool:
        """Return whether the process has certainly ended: it ran under this kernel."""
        if not self.boot or self.boot != _boot_id():
            return False
        try:
            return process_state(self.pid) in ("", "Z", "X")
        except OSError:
            return False


@contextmanager
def owned(path: Path, name: str, is_new: bool) -> Iterator[int]:
    """Own a run directory by the file `path` in it, until the end or the death of this process;
    yield the descriptor that holds the lock.

    A thread rewrites the file every second. If it was deleted it comes back; if another process
    has taken it over, this process ends at once, before it could write over the other's files.

    name: of the run. is_new: it never began, so nobody can have owned it.

    Raises:
        UserError: another process owns it.
        OSError: the file cannot be written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _locked(descriptor):
            raise _running(name, _shown(path))
        if other := _beating(path, may_return=not is_new):
            raise _running(name, f"{other}; this file system does not pass its lock to this host")
        owner = Owner(os.getpid(), os.uname().nodename, _boot_id(), secrets.token_hex(8))
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner.record(0), 0)
        beats = _Beats(path, name, owner, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    with beats.running():
        yield descriptor


def owner_of(path: Path) -> str | None:
    """Return the process that owns the run directory of this file, on any host; None if none
    does.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        if not _locked(descriptor, fcntl.LOCK_SH):
            return _shown(path)
    finally:
        os.close(descriptor)
    other = _beating(path, seconds=RETURN_S)
    return None if other is None else str(other)


@contextmanager
def followed(path: Path, name: str) -> Iterator[None]:
    """End this process when the owner that started it has lost the run directory."""
    if TOKEN not in os.environ:
        yield
        return
    over = threading.Event()

    def follow() -> None:
        while not over.wait(BEAT_S):
            end_if_lost(path, name)

    threading.Thread(target=follow, name="owner", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def end_if_lost(path: Path, name: str, token: str | None = None) -> None:
    """End this process if another than the owner that started it owns the run directory.

    It does not return: whatever this process wrote from now on could be read by the other.
    """
    token = token or os.environ.get(TOKEN)
    content = _content(path)
    other = _parsed(content)
    if token is None or not (content == FREE or (other and other.token != token)):
        return
    _ENDING.acquire()  # for ever: of several threads one prints the line
    who = other or "another process"
    sys.stderr.write(
        f"error: run.name = {name!r}: {who} has taken over this run, because this process gave no "
        "sign of life; it ends without saving, and the other continues\n"
    )
    sys.stderr.flush()
    os._exit(1)


class _Beats:
    """The thread that rewrites the file of an owner."""

    def __init__(self, path: Path, name: str, owner: Owner, descriptor: int) -> None:
        self.path, self.name, self.owner = path, name, owner
        self._lock = descriptor  # that holds the lock
        self._over = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        before = os.environ.get(TOKEN)
        os.environ[TOKEN] = self.owner.token
        thread = threading.Thread(target=self._run, name="owner", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
            _restore(TOKEN, before)
            with suppress(OSError):
                os.ftruncate(self._lock, 0)
                os.pwrite(self._lock, FREE.encode(), 0)
            os.close(self._lock)

    def _run(self) -> None:
        beat = 0
        while not self._over.wait(BEAT_S):
            beat += 1
            end_if_lost(self.path, self.name, self.owner.token)
            with suppress(OSError):  # a full or absent disk; the next beat tries again
                self._write(beat)

    def _write(self, beat: int) -> None:
        """Write a beat to the file, and lock it if it was deleted and is a new one."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.pwrite(descriptor, self.owner.record(beat), 0)
            if not os.path.sameopenfile(descriptor, self._lock):
                descriptor, self._lock = self._lock, descriptor
            _locked(self._lock)
        finally:
            os.close(descriptor)


def _locked(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock a file; True also where the file system has no locks, which leaves the beats."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _beating(path: Path, seconds: float | None = None, may_return: bool = False) -> Owner | None:
    """Return the owner whose file changes while this function watches it.

    Only changes count, not times: clocks of hosts differ.

    seconds: to watch an owner that may live; default: STALE_S. may_return: an owner may rewrite the
    file, which is missing or damaged.
    """
    first = _content(path)
    owner = _parsed(first)
    if owner is None:
        if first == FREE or not may_return:
            return None
        seconds = RETURN_S
    elif owner.is_gone:
        return None
    deadline = time.monotonic() + (STALE_S if seconds is None else seconds)
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        content = _content(path)
        if content != first and (other := _parsed(content)):
            return other
    return None


def _content(path: Path) -> str:
    """Return the text of a file, opened anew, because a client of NFS caches an open one."""
    try:
        return path.read_text(errors="replace").strip("\0 \n")
    except OSError:
        return ""


def _parsed(content: str) -> Owner | None:
    """Return the owner in a record; None if it is empty, damaged or of an earlier version."""
    try:
        record = json.loads(content)
        host, boot, token = (str(record[name]) for name in ("host", "boot", "token"))
        return Owner(int(record["pid"]), host, boot, token)
    except (ValueError, TypeError, KeyError):
        return None


def _shown(path: Path) -> str:
    """Return the owner in the file as text."""
    content = _content(path)
    return str(_parsed(content) or content or "process unknown")


def _running(name: str, owner: str) -> UserError:
    rule = f"is running already ({owner})"
    return UserError("run.name", name, rule, "wait for it, or choose another run.name")


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
