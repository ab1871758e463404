"""Record every attempt of a run, and sum up which part of its time counted; without torch."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from orchestrator.settings.errors import TrainingError, UserError, type_and_message

WIDTH = 1024  # bytes of a line, which is rewritten in place: short ones end in spaces
CAUSE_LENGTH = 300
DIED = "died"
NO_CAUSE = "killed, or its machine was lost"
GOOD_ENDS = ("finished", "stopped")


@dataclass
class Attempt:
    """One attempt of a run: a line of attempts.jsonl. Times are seconds since the epoch."""

    began: float
    seen: float  # the last sign of life; after an orderly end, the end
    ranks: int
    nodes: int
    training: float | None = None  # when its first step began
    first_step: int = 0  # steps in the checkpoint that it resumed from
    last_step: int = 0
    steps_s: float = 0.0  # seconds in its steps, without evaluations and saves
    # finished, stopped, refused, failed, died; None: it runs, or was killed
    end: str | None = None
    cause: str = ""

    @property
    def failed(self) -> bool:
        """Return whether it ended otherwise than finished or stopped, once it has ended."""
        return self.end not in GOOD_ENDS

    @property
    def why(self) -> str:
        """Return why it ended."""
        return self.cause or NO_CAUSE


class Record:
    """The line of an attempt, rewritten in place at every step: it survives a kill."""

    def __init__(self, path: Path, attempt: Attempt) -> None:
        self.path, self.attempt, self._file = path, attempt, -1
        with suppress(OSError):  # a run trains without it
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            size = os.fstat(self._file).st_size
            self._begin = size
            if size and os.pread(self._file, 1, size - 1) != b"\n":  # a damaged line before it
                self._begin += os.pwrite(self._file, b"\n", size)
            self._write()

    def add_step(self, step: int, seconds: float) -> None:
        """Count a step."""
        self.attempt.last_step = step
        self.attempt.steps_s += seconds
        self.touch()

    def touch(self) -> None:
        """Write the line, as a sign of life."""
        self.attempt.seen = time.time()
        if self._file >= 0:
            with suppress(OSError):  # a full disk
                self._write()

    def close(self, end: str, cause: str) -> None:
        """Write how the attempt ended."""
        self.attempt.end, self.attempt.cause = end, _short(cause)
        self.touch()
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _write(self) -> None:
        os.pwrite(self._file, _line(self.attempt), self._begin)


@contextmanager
def recorded(path: Path, ranks: int, nodes: int) -> Iterator[Record]:
    """Record an attempt; an exception is the cause of its end, else the caller closes it."""
    now = time.time()
    record = Record(path, Attempt(now, now, ranks, nodes))
    try:
        yield record
    except BaseException as error:
        end = DIED
        if isinstance(error, UserError | TrainingError):
            end = "refused" if isinstance(error, UserError) else "failed"
        record.close(end, type_and_message(error))
        raise


def read_attempts(path: Path) -> list[Attempt]:
    """Return the attempts of a run, without damaged lines."""
    return [attempt for _, attempt in _lines(path)]


def name_cause(path: Path, cause: str) -> None:
    """Write why the last attempt died, as the process that started it knows better than its
    ranks.
    """
    lines = _lines(path)
    if not lines or lines[-1][1].end not in (None, DIED):
        return
    begin, attempt = lines[-1]
    attempt.end, attempt.cause = DIED, _short(cause)
    with suppress(OSError), open(path, "r+b") as file:
        file.seek(begin)
        file.write(_line(attempt))


def _short(cause: str) -> str:
    """Return a cause as one line of ASCII, so that it fits into the line of its attempt."""
    return " ".join(cause.split()).encode("ascii", "replace").decode()[:CAUSE_LENGTH]


def _line(attempt: Attempt) -> bytes:
    values = {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in asdict(attempt).items()
    }
    return json.dumps(values).encode().ljust(WIDTH - 1) + b"\n"


def _lines(path: Path) -> list[tuple[int, Attempt]]:
    """Return the attempts with the first byte of their lines."""
    lines, begin = list[tuple[int, Attempt]](), 0
    content = b""
    with suppress(OSError):
        content = path.read_bytes()
    for line in content.splitlines(keepends=True):
        with suppress(ValueError, TypeError, KeyError):
            lines.append((begin, _attempt(json.loads(line))))
        begin += len(line)
    return lines


def _attempt(values: dict[str, Any]) -> Attempt:
    """Return the attempt of a line.

    Raises:
        TypeError, KeyError: it is damaged.
    """
    attempt = Attempt(**{each.name: values[each.name] for each in fields(Attempt)})
    numbers = (attempt.began, attempt.seen, attempt.steps_s, attempt.first_step, attempt.last_step)
    if any(not isinstance(each, int | float) for each in (*numbers, attempt.training or 0)):
        raise TypeError
    if not (isinstance(attempt.nodes, int) and isinstance(attempt.cause, str)):
        raise TypeError
    return attempt


# --- sums -----------------------------------------------------------------------------------------


def goodput(attempts: list[Attempt]) -> dict[str, Any] | None:
    """Return the share of the time of a run that was spent in steps that counted.

    wall_s: from the start of the first attempt to the end of the last. effective_s: in steps that
    no later attempt repeated. repeated_s: in the others (repeated_steps). between_s: from the end
    of an attempt to the start of the next. The rest are starts, evaluations, saves and the export.
    restarts: one entry for each attempt but the first.
    """
    if not attempts:
        return None
    wall = attempts[-1].seen - attempts[0].began
    effective = repeated = 0.0
    repeated_steps, resumed_from = 0, float("inf")
    for attempt in reversed(attempts):
        if attempt.training is None:
            continue
        steps = attempt.last_step - attempt.first_step
        kept = max(0, min(attempt.last_step, resumed_from) - attempt.first_step)
        share = kept / steps if steps else 0.0
        effective += attempt.steps_s * share
        repeated += attempt.steps_s * (1 - share)
        repeated_steps += int(steps - kept)
        resumed_from = min(resumed_from, attempt.first_step)
    pairs = list(pairwise(attempts))
    return {
        "goodput": round(effective / wall, 4) if wall > 0 else None,
        "wall_s": round(wall, 3),
        "effective_s": round(effective, 3),
        "repeated_s": round(repeated, 3),
        "between_s": round(sum(max(0.0, after.began - ended.seen) for ended, after in pairs), 3),
        "repeated_steps": repeated_steps,
        "restarts": [_restart(ended, after) for ended, after in pairs],
    }


def _restart(ended: Attempt, after: Attempt) -> dict[str, Any]:
    """Return why an attempt ended, where the next one continued, and how long that took."""
    training = after.training  # None: it ended before its first step
    return {
        "end": ended.end or DIED,
        "cause": ended.why,
        "after_step": ended.last_step,
        "from_step": None if training is None else after.first_step,
        # from the end of the attempt to the first step of the next
        "seconds": None if training is None else round(max(0.0, training - ended.seen), 3),
    }
