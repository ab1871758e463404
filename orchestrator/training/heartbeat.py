"""Heartbeats, which tell every process of a run where each rank is, and what hangs.

A heartbeat file is overwritten in place and keeps its size, so that it is written on a full disk as
well. Clocks of machines are never compared: a rank is silent while its file stays the same.
"""

import json
import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from orchestrator.processes import process_state
from orchestrator.settings.counts import counted
from orchestrator.training.rundir import RunDir

Phase = Literal[
    "start",
    "tokenise",
    "fill",  # the cache of reference log-probs
    "collate",
    "forward",
    "backward",
    "reduce",  # a small reduction, in which ranks wait for each other
    "update",
    "callbacks",  # of a step, and the log
    "evaluate",
    "save",
    "export",
    "done",
]
"""Phases of a run on a rank."""

IN_STEP: tuple[Phase, ...] = ("collate", "forward", "backward", "reduce", "update")
"""Phases that belong to the step in progress, which is not counted yet."""
MULTIPLES: dict[Phase, float] = {
    "start": 12.0,
    "callbacks": 4.0,
    "save": 6.0,
    "export": 12.0,
    "done": float("inf"),
}
"""Times cluster.hang_timeout_s that a rank may spend in a phase without a beat; 1 for others."""
TOKENISE_S = 86400.0  # a rank may wait for the process that tokenises
BUSY = 10.0  # times longer if the process computes: it may be slow rather than hang
LEARNED = 5.0  # times the longest interval between two beats of a phase so far

SILENT_S = 8.0  # seconds after which a heartbeat file that stays the same shows a stopped process
BYTES = 2048  # size of a heartbeat file
PLACE = struct.Struct("<4q")  # step, number of the phase, index and order of a rank's newest beat
PHASES: tuple[Phase, ...] = get_args(Phase)


def bound_of(phase: Phase, timeout_s: float, longest: float, is_busy: bool) -> float:
    """Return the seconds that a rank may spend in a phase without a beat."""
    if phase == "tokenise":
        return TOKENISE_S
    floor = timeout_s * MULTIPLES.get(phase, 1.0)
    return max(floor * BUSY if is_busy else floor, LEARNED * longest)


@dataclass(frozen=True)
class Heartbeat:
    """The place of a rank, as its file holds it."""

    rank: int
    step: int  # steps taken
    phase: Phase
    index: int  # of the micro-batch in the phase, from 1
    order: int  # of the beat among those of this step
    age: float  # seconds since the beat when the file was written, without those of a suspension
    bound: float  # seconds that the rank may spend there
    timeout_s: float  # see bound_of
    memory: int  # file descriptor in the rank's process of its newest PLACE; -1: none
    user_code: str | None  # the user's function that runs
    at_prompt: bool  # a debugger waits for its user
    seconds: dict[str, float]  # own work so far, without waiting for other ranks
    slowest_code: str | None  # the user's function that has taken the most seconds
    time: float  # when the file was written, in seconds since the epoch
    pid: int
    host: str

    @property
    def progress(self) -> tuple[int, int]:
        """Return the place as numbers that only grow during an attempt, alike on all ranks."""
        return self.step, self.order

    @property
    def place(self) -> str:
        """Return rank, node, step and phase in words."""
        step = self.step + (self.phase in IN_STEP)
        number = f" of micro-batch {self.index}" if self.index else ""
        return f"rank {self.rank} on {self.host}, step {step}, {self.phase}{number}"

    def encoded(self) -> bytes:
        """Return the content of the file."""
        return json.dumps(asdict(self)).encode().ljust(BYTES)


def decoded(content: bytes) -> Heartbeat | None:
    """Return the heartbeat of a file; None if it is damaged, incomplete or of an older version."""
    with suppress(ValueError, KeyError, TypeError):
        values = json.loads(content)
        return Heartbeat(**{field.name: values[field.name] for field in fields(Heartbeat)})
    return None


def newest_place(beat: Heartbeat) -> Heartbeat:
    """Return a heartbeat with the newest place of its rank, which a process of this machine shows
    in its memory even if it is stopped.
    """
    if beat.host != os.uname().nodename or beat.memory < 0:
        return beat
    with suppress(OSError, struct.error, IndexError):
        content = Path(f"/proc/{beat.pid}/fd/{beat.memory}").read_bytes()
        step, number, index, order = PLACE.unpack_from(content)
        if (step, order) == beat.progress:
            return beat
        phase = PHASES[number]
        bound = bound_of(phase, beat.timeout_s, 0.0, is_busy=False)
        return replace(beat, step=step, phase=phase, index=index, order=order, bound=bound)
    return beat


class Observed(NamedTuple):
    """A rank's newest heartbeat, and the seconds since its file has changed."""

    beat: Heartbeat
    silent_s: float

    @property
    def is_silent(self) -> bool:
        """Return whether the rank's process does not respond."""
        return self.silent_s > SILENT_S

    @property
    def age(self) -> float:
        """Return the seconds that the rank has been at its place."""
        return self.beat.age + (self.silent_s if self.is_silent else 0.0)


class Observer:
    """Reads the heartbeats of ranks again and again, and notes since when each stays the same."""

    def __init__(self, run_dir: RunDir, size: int) -> None:
        self.paths = [run_dir.heartbeat(rank) for rank in range(size)]
        self._seen: dict[int, tuple[bytes, Heartbeat, float]] = {}

    def look(self, now: float) -> list[Observed]:
        """Return the ranks that have written a heartbeat. now: monotonic seconds, without those in
        which the reader itself was suspended.
        """
        for rank, path in enumerate(self.paths):
            with suppress(OSError):
                content = path.read_bytes()
                before = self._seen.get(rank)
                if (before is None or content != before[0]) and (beat := decoded(content)):
                    self._seen[rank] = content, beat, now
        ranks = [Observed(beat, now - since) for _, beat, since in self._seen.values()]
        return [
            each._replace(beat=newest_place(each.beat)) if each.is_silent else each
            for each in ranks
        ]


def hung_ranks(ranks: Iterable[Observed], waited_out: bool = False) -> list[Observed]:
    """Return the ranks that all others wait for and that have exceeded their bound.

    waited_out: the caller has waited for others as long as a collective may take.
    """
    active = [each for each in ranks if each.beat.phase != "done"]
    if not active or any(each.beat.at_prompt for each in active):
        return []
    last = min(each.beat.progress for each in active)
    behind = [each for each in active if each.beat.progress == last]
    if len(behind) == len(active):
        waited_out = False  # nobody is ahead and waits
        silent = [each for each in behind if each.is_silent]
        # user code is not collective, so a rank in it does not wait
        behind = silent or [each for each in behind if each.beat.user_code] or behind
    hung = [each for each in behind if waited_out or each.age > each.beat.bound]
    return sorted(hung, key=lambda each: each.beat.rank)


def hang_line(hung: list[Observed], run_dir: RunDir) -> str:
    """Return the line that names the ranks that hang."""
    first = hung[0]
    others = f" (and {counted(len(hung) - 1, 'other rank')})" if len(hung) > 1 else ""
    if first.is_silent:
        what = f"does not respond, {_why_silent(first.beat)},"
    elif first.beat.user_code:
        what = f"hangs in {first.beat.user_code}"
    else:
        what = "hangs"
    stacks = run_dir.stacks(first.beat.rank)
    where = f"its stack is {stacks}" if stacks.exists() else "its stack could not be read"
    if len(list(run_dir.logs.glob("stacks_*.txt"))) > 1:
        where += f"; those of other ranks are {run_dir.logs}/stacks_*.txt"
    return f"{first.beat.place}{others}: {what} for {first.age:.0f} s; {where}"


def _why_silent(beat: Heartbeat) -> str:
    """Return why a process of this machine does not respond, as far as Linux tells."""
    if beat.host != os.uname().nodename:
        return "as its process or its machine is stopped or lost"
    state = ""
    with suppress(OSError):
        state = process_state(beat.pid)
    if not state:
        return "as its process is gone"
    if state in "Tt":
        return f"as its process {beat.pid} is stopped (SIGSTOP)"
    return f"as code in its process {beat.pid} holds Python's global lock"


def remove_heartbeats(run_dir: RunDir) -> None:
    """Remove what an earlier attempt published; before any rank starts."""
    for path in (run_dir.hang, *run_dir.logs.glob("heartbeat_*.json")):
        path.unlink(missing_ok=True)


def reported_hang(run_dir: RunDir) -> str | None:
    """Return the line of the hang that ended the attempt, or None."""
    with suppress(OSError):
        return run_dir.hang.read_text().strip() or None
    return None
