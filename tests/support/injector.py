"""The injector: user code of a run that makes planned faults happen, each at its point, step and
rank.

A test calls `plan`, adds the words of `words` to the command and the environment of `plan` to its
processes. A run that is to be compared has the same words and no plan. Each fault happens once, or
`times` times, on each of its ranks, in all attempts of a run together.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from orchestrator.data.collate import CollateContext
from orchestrator.dpo.losses import PairTerms, log_ratios
from orchestrator.settings.loss import DpoSpec
from support.user_collators import Rows, plain

PLAN = "INJECTED_FAULTS"  # environment: the file of the plan
HOURS = 36_000.0


class Fault(NamedTuple):
    """A fault: what happens (a key of KINDS), at which point of the user code, in which step
    (counted from 1) and on which rank (None: on every one that gets there).

    point: collator, loss, compute_metrics, or an event of callbacks (on_step_end); callbacks and
    compute_metrics run on rank 0 only. every: also in all later steps.
    """

    kind: str
    point: str
    step: int
    rank: int | None = 0
    seconds: float = HOURS  # of sleep, hold_gil and spin
    times: int = 1
    every: bool = False


def plan(folder: Path, *faults: Fault) -> dict[str, str]:
    """Write a plan into a folder, and return the environment with which a run follows it."""
    path = folder / "faults.json"
    path.write_text(json.dumps(faults))
    return {PLAN: str(path)}


def words(*points: str) -> list[str]:
    """Return the words that add the user code of these points to a command."""
    parts = {
        "collator": "data.collator=support.injector:collator",
        "loss": "dpo.loss_type=support.injector:loss",
        "compute_metrics": "evaluation.compute_metrics=support.injector:compute_metrics",
    }
    # which tells the others the step
    names = {*points, *(["collator"] if {"loss", "compute_metrics"} & {*points} else [])}
    callbacks = [] if names <= parts.keys() else ["callbacks=[support.injector:Callback]"]
    return [parts[name] for name in parts if name in names] + callbacks


# --- the kinds ------------------------------------------------------------------------------------


def hold_gil(seconds: float) -> None:
    """Sleep in C without releasing the GIL, so that no thread of this process runs."""
    ctypes.PyDLL(None).sleep(int(seconds))


def spin(seconds: float) -> None:
    """Loop in Python."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def send(number: signal.Signals) -> Callable[[float], None]:
    """Return a function that sends this process a signal."""
    return lambda _: os.kill(os.getpid(), number)


def throw(error: BaseException) -> Callable[[float], None]:
    """Return a function that raises."""

    def raises(_: float) -> None:
        raise error

    return raises


KINDS: dict[str, Callable[[float], object]] = {
    "sleep": time.sleep,
    "hold_gil": hold_gil,
    "spin": spin,
    "stop": send(signal.SIGSTOP),
    "kill": send(signal.SIGKILL),
    "segv": send(signal.SIGSEGV),
    "term": send(signal.SIGTERM),
    "hup": send(signal.SIGHUP),
    "usr1": send(signal.SIGUSR1),
    "raise": throw(RuntimeError("injected")),
    "os_error": throw(OSError(5, "Input/output error")),
    "memory_error": throw(MemoryError()),
    "exit": lambda _: sys.exit(0),
    "breakpoint": lambda _: breakpoint(),
}


# --- the points, as user code ---------------------------------------------------------------------


class Position:
    """The step that this process is in, by the collator's context."""

    step = 0


def reach(point: str, step: int) -> None:
    """Make the faults happen that are planned for this point and step on this rank."""
    path = os.environ.get(PLAN)
    if path is None:
        return
    rank = dist.get_rank() if dist.is_initialized() else 0
    for number, fault in enumerate(Fault(*each) for each in json.loads(Path(path).read_text())):
        is_due = step == fault.step or (fault.every and step > fault.step)
        if (fault.point, is_due) == (point, True) and fault.rank in (None, rank):
            fired = (Path(path).with_suffix(f".{number}.{rank}.{n}") for n in range(fault.times))
            if fault.every or _is_first(fired):
                KINDS[fault.kind](fault.seconds)


def _is_first(files: Iterable[Path]) -> bool:
    """Create the first of the files that does not exist; return whether there was one."""
    for path in files:
        with suppress(FileExistsError):
            path.touch(exist_ok=False)
            return True
    return False


def fired_at(folder: Path) -> float:
    """Return when the newest fault of a plan happened, in seconds since the epoch."""
    return max(path.stat().st_mtime for path in folder.glob("faults.*.*.*"))


def collator(rows: Rows, context: CollateContext) -> dict[str, torch.Tensor]:
    Position.step = context.step
    reach("collator", context.step)
    return plain(rows)


def loss(terms: PairTerms, dpo: DpoSpec) -> torch.Tensor:
    """A squared distance of the margin from 5, which learns."""
    if torch.is_grad_enabled():
        reach("loss", Position.step)
    chosen, rejected = log_ratios(terms)
    return (chosen - rejected - 5.0).square()


def compute_metrics(prediction: Any) -> dict[str, float]:
    reach("compute_metrics", Position.step)
    return {"pairs": float(len(prediction.label_ids))}


class Callback(TrainerCallback):
    """Reaches each of its events; those before an update belong to the step in progress."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        Position.step = state.global_step + 1
        reach("on_step_begin", Position.step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        reach("on_step_end", state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        reach("on_log", state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        reach("on_evaluate", state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        reach("on_save", state.global_step)
