"""The injector: every rank of every system calls it, and it makes the fault of a cell happen once.

A loop creates one Injector, calls `begin` before and `done` after each step, and multiplies its
loss by `factor`. What happened is appended to CELL/events.jsonl, which the harness reads.
"""

import ctypes
import json
import math
import os
import re
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

CELL = "SURVIVAL_CELL"  # environment: the folder of the cell
# Seconds that the last SLOW steps before a fault take at least, as in a real run: a system may need
# a while to commit a save. Also of all steps between a SIGTERM and the end that it asks for
PACE_S, SLOW = 1.0, 3
# Bytes of a file in the killed save: less than half of any system's files of weights and state,
# more than anything else that a rank writes
CUT_AT = 96 * 2**10
BALLAST = "work/ballast"  # the file of a cell that fills its disk


class Fault(NamedTuple):
    """A fault: what it does (an attribute of Injector), before which step, and on which rank."""

    title: str
    action: str = ""
    step: int = 13
    rank: int = 0
    new_step: int = 13  # the first step that shows that the run goes on


FAULTS = {
    "none": Fault("undisturbed"),
    "kill-one": Fault("kill -9 of one rank, between saves", "kill_self", rank=1),
    "kill-all": Fault("kill -9 of all ranks, between saves", "kill_all"),
    "kill-in-save": Fault(
        "kill -9 of rank 0, in the middle of a file of a checkpoint", "kill_in_save", 15, 0, 16
    ),
    "damaged": Fault(
        "kill -9 of all ranks, and a file of the newest checkpoint is cut in half", "damage"
    ),
    "disk-full": Fault("disk full during one save", "fill_disk", 15, 0, 16),
    "sigterm": Fault("preemption: SIGTERM, 30 s, SIGKILL; queued again", "preempt"),
    "nan-loss": Fault("NaN loss at one step on one rank", "spoil_loss", rank=1),
    "hang": Fault("one rank hangs (SIGSTOP)", "stop_self", rank=1),
}


def note(kind: str, **fields: Any) -> None:
    """Append an event; a single write, so ranks do not mix their lines."""
    line = json.dumps({"time": time.time(), "kind": kind, "pid": os.getpid(), **fields}) + "\n"
    file = os.open(Path(os.environ[CELL], "events.jsonl"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, line.encode())
    os.close(file)


def events(cell: Path) -> list[dict[str, Any]]:
    """Return the events of a cell so far."""
    with suppress(FileNotFoundError):
        return [json.loads(line) for line in (cell / "events.jsonl").read_text().splitlines()]
    return []


def free_disk(cell: Path) -> None:
    """Make room again: the disk is full for one save only, so this is called before each attempt,
    when ranks start again, and after the next step.
    """
    (cell / BALLAST).unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


class Injector:
    """The injector of one rank."""

    def __init__(self, rank: int) -> None:
        self.cell, self.rank, self.factor = Path(os.environ[CELL]), rank, 1.0
        self.plan: dict[str, str] = json.loads((self.cell / "plan.json").read_text())
        self.fault = FAULTS[self.plan["fault"]]
        self.fired = self.cell / "fired"
        self.slows = self.fault.action == "preempt" and not self.fired.exists()
        if rank == 0:
            free_disk(self.cell)
        note("start", rank=rank)

    def begin(self, step: int) -> None:
        """Make the fault happen if it is due before this step, counted from 1."""
        self.factor = 1.0
        if step == self.fault.step + 2 and self.rank == 0:
            free_disk(self.cell)
        if self._is_slow(step):
            time.sleep(PACE_S)
        if not self.fault.action or (step, self.rank) != (self.fault.step, self.fault.rank):
            return
        with suppress(FileExistsError):
            self.fired.touch(exist_ok=False)
            note("fault", step=step, rank=self.rank)
            getattr(self, self.fault.action)()

    def _is_slow(self, step: int) -> bool:
        if self.fired.exists():
            return self.slows
        return bool(self.fault.action) and 0 <= self.fault.step - step < SLOW

    def done(self, step: int) -> None:
        """Note that the step was taken."""
        if self.rank == 0:
            note("done", step=step)

    # --- the faults -------------------------------------------------------------------------------

    def kill_self(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_all(self) -> None:
        ranks = {e["rank"]: e["pid"] for e in events(self.cell) if e["kind"] == "start"}
        for pid in ranks.values():
            if pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
        self.kill_self()

    def kill_in_save(self) -> None:
        """SIGKILL inside the write that takes a file beyond CUT_AT, whoever calls it."""

        def killed(_: int) -> None:
            note("killed")
            os.kill(os.getpid(), signal.SIGKILL)

        # set through C: Python's own handlers run only after the write has returned
        self.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(killed)
        set_handler: Callable[..., Any] = ctypes.CDLL(None).signal
        set_handler(ctypes.c_int(signal.SIGXFSZ), self.handler)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (CUT_AT, hard))

    def damage(self) -> None:
        saved = [path for path in self.cell.glob(self.plan["checkpoints"]) if _files(path)]
        newest = max(saved, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
        largest = max(_files(newest), key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
        note("damaged", file=str(largest.relative_to(self.cell)))
        self.kill_all()

    def fill_disk(self) -> None:
        with suppress(OSError), open(self.cell / BALLAST, "wb", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                with suppress(OSError):
                    while file.write(bytes(size)):
                        pass

    def preempt(self) -> None:
        os.kill(int((self.cell / "launcher.pid").read_text()), signal.SIGTERM)

    def spoil_loss(self) -> None:
        self.factor = math.nan

    def stop_self(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
