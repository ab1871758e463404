"""Check that bad input is refused with exit code 2 and one line of key, value, rule and fix."""

import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support.command_line import orchestrator
from support.timeouts import scaled_timeout
from support.tiny_settings import random_rows, raw_settings

LIMIT_S, RAY_LIMIT_S = 30.0, 60.0  # wall time of a refusal, where other tests run beside it
MARK = "REFUSAL_TEST"  # an environment variable by which a process left behind is found
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
GONE: Any = object()  # an edit that removes a key
NO_INIT = {"model.init": GONE}

GOOD = random_rows(6)
CHAT = random_rows(6, conversational=True)

Run = Callable[..., tuple[int, str, str]]
"""Run the words of a command; return its exit code, stdout and stderr."""


class Refusal(NamedTuple):
    """Parts that the one line must contain: it begins with the key and ends with the fix."""

    key: str
    value: str
    rule: str
    fix: str


class UserInput(NamedTuple):
    """Words that the user types and files that they write, besides raw_settings in run.yaml."""

    words: tuple[str, ...] = ()  # after run.yaml on the command line
    edits: dict[str, Any] = {}  # of run.yaml, by dotted key
    text: str | None = None  # of run.yaml, instead of any settings
    rows: list[Any] | None = None  # of train.jsonl; a string is written as it is
    files: dict[str, str] = {}  # by name
    model: str | None = None  # the name of a folder made by `models`
    # only the rank itself can know: weights were loaded, the collator ran, or it evaluated
    late: bool = False


def case(name: str, words: str, *refusal: str, **user_input: Any) -> Any:
    """Return one row of a table; `refusal` is key, value, rule, fix."""
    return pytest.param(
        UserInput(tuple(words.split("|")) if words else (), **user_input),
        Refusal(*refusal),
        id=name,
    )


def write_input(folder: Path, user_input: UserInput) -> None:
    raw = raw_settings(folder)
    for dotted, value in user_input.edits.items():
        *blocks, key = dotted.split(".")
        block = raw
        for name in blocks:
            block = block.setdefault(name, {})
        if value is GONE:
            del block[key]
        else:
            block[key] = value
    (folder / "run.yaml").write_text(
        json.dumps(raw) if user_input.text is None else user_input.text
    )
    if user_input.rows is not None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in user_input.rows]
        (folder / "train.jsonl").write_text("".join(line + "\n" for line in lines))
    for name, text in user_input.files.items():
        (folder / name).write_text(text)


def assert_refused(code: int, stderr: str, refusal: Refusal) -> None:
    assert "Traceback" not in stderr, stderr
    assert code == 2, stderr
    (line,) = stderr.splitlines()
    assert line.startswith(f"error: {refusal.key}"), line
    missing = [part for part in refusal if part not in line]
    assert not missing, f"{missing} not in: {line}"
    assert refusal.fix in line.partition("; ")[2], line


def assert_refused_before_begin(
    folder: Path, user_input: UserInput, code: int, stderr: str, refusal: Refusal
) -> None:
    """Check a refusal, whose line may name files in `folder`, and that no run has begun there."""
    assert_refused(code, stderr.replace(f"{folder}/", ""), refusal)
    begun = (folder / "runs" / "tiny" / "config.yaml").exists()
    assert user_input.late or not begun, "refused only after the run began"


def assert_nothing_runs(mark: str) -> None:
    """Check that no process that inherited the mark is alive; Ray's daemons get time to end."""
    marked, deadline = f"{MARK}={mark}".encode(), time.monotonic() + scaled_timeout(10)
    while left := [
        path.parent.name
        for path in Path("/proc").glob("[0-9]*/environ")
        if marked in environment(path)
    ]:
        assert time.monotonic() < deadline, f"processes {left} were left behind"
        time.sleep(0.2)


def environment(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\0")
    except OSError:  # it ended meanwhile, or is another user's
        return []


def run_in_process(
    folder: Path, *words: str, limit: float = LIMIT_S, env: dict[str, str] | None = None
) -> tuple[int, str, str]:
    """Run `orchestrator WORDS` in `folder`; return its exit code, stdout and stderr.

    Fails when the command is slow or leaves a process behind.
    """
    mark = uuid.uuid4().hex
    done = orchestrator(
        *words, cwd=folder, env={**OFFLINE, **(env or {}), MARK: mark}, timeout=limit
    )
    assert_nothing_runs(mark)
    return done.returncode, done.stdout, done.stderr


def command(folder: Path, user_input: UserInput, models: Path) -> list[str]:
    """Write the user's files; return the words of the command that reads them."""
    if user_input.model:
        user_input = user_input._replace(
            edits={**NO_INIT, "model.path": str(models / user_input.model), **user_input.edits}
        )
    write_input(folder, user_input)
    return [
        "debug",
        "run.yaml",
        *(word.replace("{models}", str(models)) for word in user_input.words),
    ]
