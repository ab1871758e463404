"""The lines of metrics.jsonl: read them from the file, or form them from a run's log history."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Line = dict[str, Any]
"""The metrics of a step, and the step."""


def parsed_lines(path: Path) -> tuple[list[Line], list[int]]:
    """Return the lines of a metrics.jsonl, and the numbers of those that are damaged."""
    lines: list[Line] = []
    damaged: list[int] = []
    try:
        texts = path.read_bytes().split(b"\n")
    except OSError:  # there is none, or it cannot be read: the run writes it again
        return [], []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text or b"null")
        except ValueError:
            line = None  # not UTF-8 or not JSON
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        elif text:
            damaged.append(number)
    return lines, damaged


def damaged_line(path: Path, numbers: list[int]) -> str:
    """Return a text that names damaged lines of a file."""
    shown = ", ".join(map(str, numbers[:5])) + f" and {len(numbers) - 5} more" * (len(numbers) > 5)
    return f"{path}: damaged in line {shown}"


def lines_of(history: Iterable[Line]) -> list[Line]:
    """Return one line for each step of a TrainerState.log_history, with all metrics of the step."""
    lines: dict[int, Line] = {}
    for logs in history:
        lines.setdefault(logs["step"], {"step": logs["step"]}).update(logs)
    return list(lines.values())
