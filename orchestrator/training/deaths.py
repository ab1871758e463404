"""Name what ended a rank first: each rank leaves its place and its exception in a file.

The file is overwritten in place at every beat, so that it holds the last place of a rank that was
killed. After an attempt has died, the process that started it reads the files of all ranks.
"""

import faulthandler
import json
import os
import re
import signal
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TextIO

import torch

from orchestrator.settings.errors import (
    NOT_THE_USERS,
    PACKAGE,
    MachineError,
    TrainingError,
    UserError,
    message_of,
    type_and_message,
)
from orchestrator.training.heartbeat import IN_STEP, Phase
from orchestrator.training.rundir import RunDir

BYTES = 4096  # size of a file: it keeps it, so that it can be written on a full disk
MOST_PAIRS = 16  # pair ids in a line
IN_MICRO_BATCH: tuple[Phase, ...] = ("forward", "backward")
LOST_A_PEER = re.compile(
    r"connection (closed|reset|refused)|connection was likely closed|timed out|broken pipe|gloo|"
    r"nccl|remote process exited|process group|TCPStore|heartbeat",
    re.IGNORECASE,
)
"""In messages of exceptions that a rank raises because another one is gone."""
CRASHES = {
    "Segmentation fault": "SIGSEGV",
    "Bus error": "SIGBUS",
    "Aborted": "SIGABRT",
    "Floating point exception": "SIGFPE",
    "Floating-point exception": "SIGFPE",
    "Illegal instruction": "SIGILL",
}
"""Signals by the words of faulthandler."""
FRAME = re.compile(r'File "([^"]+)", line (\d+) in (\S+)')
_OPEN: list[TextIO] = []  # files that a crash writes: they stay open as long as the process
LESS_MEMORY = "lower batch.micro_batch_size or data.max_length, or shard the model over more ranks"


@dataclass(frozen=True)
class LastPlace:
    """The last place of a rank, and the exception that ended it, as its file holds them."""

    rank: int
    host: str
    pid: int
    time: float  # of the beat, or of the exception
    step: int  # steps taken
    phase: Phase
    pairs: tuple[int, ...]  # of the micro-batch, while one is in progress
    oom_kills: int | None  # of the node, at the start of the rank or at its exception
    error: str | None = None
    code: str | None = None  # that raised it
    lost_peer: bool = False  # it raised because another rank was gone
    memory: bool = False

    @property
    def current_step(self) -> int:
        """Return the step in progress, or the last one taken."""
        return self.step + (self.phase in IN_STEP)

    @property
    def place(self) -> str:
        """Return rank, node, step, phase and pairs in words."""
        text = f"rank {self.rank} on {self.host}, step {self.current_step}, {self.phase}"
        if not self.pairs:
            return text
        more = " ..." if len(self.pairs) == MOST_PAIRS else ""
        return f"{text}, pairs {', '.join(map(str, self.pairs))}{more}"


class PlaceFile:
    """Writer of one rank's file."""

    def __init__(self, run_dir: RunDir, rank: int) -> None:
        self.last = LastPlace(
            rank, os.uname().nodename, os.getpid(), time.time(), 0, "start", (), oom_kills()
        )
        self._path, self._file = _path(run_dir, rank), -1
        self._write()

    def move(self, step: int, phase: Phase, pairs: torch.Tensor | None = None) -> None:
        """Write the place of this rank; pairs: ids of the micro-batch that begins."""
        ids = self.last.pairs if phase in IN_MICRO_BATCH else ()
        if pairs is not None:
            ids = tuple(pairs[:MOST_PAIRS].tolist())
        self.last = replace(self.last, time=time.time(), step=step, phase=phase, pairs=ids)
        self._write()

    def fail(self, error: BaseException) -> None:
        """Write the exception that ends this rank."""
        if isinstance(error, MachineError) and error.__cause__ is not None:
            error = error.__cause__  # what user code raised
        names_cause = isinstance(error, UserError | TrainingError)
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        self.last = replace(
            self.last,
            time=time.time(),
            oom_kills=oom_kills(),
            error=message_of(error) if names_cause else f"raised {type_and_message(error)}",
            code=None if names_cause else _raised_in(error),
            lost_peer=not memory and bool(LOST_A_PEER.search(f"{type(error)} {error}")),
            memory=memory,
        )
        self._write()

    def _write(self) -> None:
        # a full disk, which the checkpoint reports, or no directory yet: rank 0 creates that of a
        # new run while this one waits
        with suppress(OSError):
            if self._file < 0:
                self._file = os.open(self._path, os.O_CREAT | os.O_WRONLY, 0o644)
            text = json.dumps(vars(self.last)).encode()
            os.pwrite(self._file, text[:BYTES].ljust(BYTES), 0)


@dataclass(frozen=True)
class Death:
    """The first cause of the end of an attempt: the step in progress, and the line."""

    rank: int
    step: int | None  # None: it died before the first step
    line: str


def record_crashes(run_dir: RunDir, rank: int) -> None:
    """Let a crash of this process (SIGSEGV, SIGBUS, ...) write its signal and the Python stack."""
    with suppress(OSError):
        file = _crash_file(run_dir, rank).open("w")
        _OPEN.append(file)
        faulthandler.enable(file, all_threads=False)


def remove_places(run_dir: RunDir) -> None:
    """Remove what ranks of an earlier attempt left; before any rank starts."""
    for name in ("death_*.json", "crash_*.txt"):
        for path in run_dir.logs.glob(name):
            path.unlink(missing_ok=True)


def first_death(run_dir: RunDir, gone: Mapping[int, str | None]) -> Death | None:
    """Return what ended the attempt first; None if no rank left anything.

    Ranks that lost another one do not lead. The order is that of time.

    gone: ranks whose process ended without an exception, with the signal or exit code if known.
    """
    places = {place.rank: place for place in _read_places(run_dir)}
    first = [
        place
        for place in places.values()
        if (place.error and not place.lost_peer) or (place.error is None and place.rank in gone)
    ]
    # others lost a rank that nobody has noticed
    first = first or [place for place in places.values() if place.error is None]
    first = first or list(places.values())
    if not first or not (gone or any(place.error for place in places.values())):
        return None
    place = min(first, key=lambda place: place.time)
    in_steps = place.phase not in ("start", "tokenise", "fill", "export", "done")
    what = _exception(place) if place.error else _signal(run_dir, place, gone, places)
    step = place.current_step if in_steps else None
    return Death(place.rank, step, f"{place.place}: {what}")


def _exception(place: LastPlace) -> str:
    text = f"{place.error}" + (f" in {place.code}" if place.code else "")
    return f"{text}; {LESS_MEMORY}" if place.memory else text


def _signal(
    run_dir: RunDir,
    place: LastPlace,
    gone: Mapping[int, str | None],
    places: Mapping[int, LastPlace],
) -> str:
    """Return what ended a process that could not write it itself."""
    crash, code = _crash(run_dir, place.rank)
    name = gone.get(place.rank) or crash or "SIGKILL"
    verb = "killed by" if name.startswith("SIG") else "ended by"
    text = f"{verb} {name}" + (f" in {code}" if code else "")
    if name != "SIGKILL":
        return text
    after = [each.oom_kills for each in places.values() if each.host == place.host and each.error]
    after += [oom_kills()] if place.host == os.uname().nodename else []
    known = [count for count in after if count is not None]
    if place.oom_kills is None or not known:
        return f"{text} (whether for lack of memory is not known: see dmesg there)"
    if max(known) > place.oom_kills:
        return f"{text} by the kernel, as its node ran out of memory; {LESS_MEMORY}"
    return f"{text}, not for lack of memory"


def oom_kills() -> int | None:
    """Return how many processes the kernel has killed here for lack of memory; None: unknown."""
    counts = list[int]()
    for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with suppress(OSError, ValueError):
            words = Path(path).read_text().split()
            counts.append(int(words[words.index("oom_kill") + 1]))
    return sum(counts) if counts else None


def ending(returncode: int) -> str:
    """Return the signal or exit code that ended a process, by subprocess's return code."""
    with suppress(ValueError):
        return signal.Signals(-returncode).name
    return f"exit code {returncode}"


def _path(run_dir: RunDir, rank: int) -> Path:
    return run_dir.logs / f"death_{rank:05d}.json"


def _crash_file(run_dir: RunDir, rank: int) -> Path:
    return run_dir.logs / f"crash_{rank:05d}.txt"


def _read_places(run_dir: RunDir) -> list[LastPlace]:
    """Return the places of all ranks that left one, without damaged files."""
    places = list[LastPlace]()
    for path in sorted(run_dir.logs.glob("death_*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            values = json.loads(path.read_bytes())
            place = {field.name: values[field.name] for field in fields(LastPlace)}
            places.append(LastPlace(**{**place, "pairs": tuple(place["pairs"])}))
    return places


def _crash(run_dir: RunDir, rank: int) -> tuple[str | None, str | None]:
    """Return the signal that faulthandler saw, and the user's code that ran."""
    try:
        text = _crash_file(run_dir, rank).read_text(errors="replace")
    except OSError:
        return None, None
    name = next((name for words, name in CRASHES.items() if words in text), None)
    frames = [(path, int(line), function) for path, line, function in FRAME.findall(text)]
    return name, _code_of(frames)


def _raised_in(error: BaseException) -> str | None:
    """Return the user's code that raised an exception; else the place in ours."""
    frames = [
        (frame.filename, frame.lineno or 0, frame.name)
        for frame in reversed(traceback.extract_tb(error.__traceback__))
    ]
    return _code_of(frames)


def _code_of(frames: list[tuple[str, int, str]]) -> str | None:
    """Return the innermost frame of the user's code in words, else the innermost of ours."""
    ours = [frame for frame in frames if frame[0].startswith(PACKAGE)]
    users = [frame for frame in frames if not frame[0].startswith((*NOT_THE_USERS, "<"))]
    for path, line, function in [*users[:1], *ours[:1]]:
        return f"{function} ({Path(path).name} line {line})"
    return None
