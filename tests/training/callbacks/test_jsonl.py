"""metrics.jsonl has one line per step, whatever happened between."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.training.callbacks import jsonl as module
from orchestrator.training.callbacks.jsonl import JsonlCallback
from orchestrator.training.rundir import RunDir

History = list[dict[str, Any]]


def begin(path: Path, history: History = []) -> tuple[JsonlCallback, SimpleNamespace]:  # noqa: B006
    """history: that of the checkpoint that the run resumes from."""
    callback, state = JsonlCallback(path), SimpleNamespace(log_history=list(history))
    callback.on_train_begin(None, state, None)
    return callback, state


def log(callback: JsonlCallback, state: Any, step: int, **logs: float) -> None:
    state.global_step = step
    state.log_history.append({**logs, "step": step})
    callback.on_log(None, state, None, logs=logs)


def lines(path: Path) -> list[dict[str, Any]]:
    assert path.read_text() == "" or path.read_text().endswith("\n")
    return [json.loads(line) for line in path.read_text().splitlines()]


def three_steps(path: Path) -> History:
    callback, state = begin(path)
    log(callback, state, 0, eval_loss=0.7)
    for step in (1, 2, 3):
        log(callback, state, step, loss=1 / step)
    log(callback, state, 3, eval_loss=0.6)
    return state.log_history


THREE_STEPS = [
    {"step": 0, "eval_loss": 0.7},
    {"step": 1, "loss": 1.0},
    {"step": 2, "loss": 0.5},
    {"step": 3, "loss": 1 / 3, "eval_loss": 0.6},
]


def test_a_step_and_its_evaluation_are_one_line(tmp_path: Path) -> None:
    three_steps(tmp_path / "metrics.jsonl")
    assert lines(tmp_path / "metrics.jsonl") == THREE_STEPS


def test_each_line_is_on_disk_at_once(tmp_path: Path) -> None:
    callback, state = begin(path := tmp_path / "metrics.jsonl")
    for step in range(1, 4):
        log(callback, state, step, loss=0.5)
        assert len(lines(path)) == step


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_run_drops_the_steps_that_happen_again(tmp_path: Path, step: int) -> None:
    history = three_steps(path := tmp_path / "metrics.jsonl")
    callback, state = begin(path, [logs for logs in history if logs["step"] <= step])
    assert lines(path) == THREE_STEPS[: step + 1]
    log(callback, state, step + 1, loss=9.0)
    assert lines(path) == [*THREE_STEPS[: step + 1], {"step": step + 1, "loss": 9.0}]


def test_a_resumed_run_goes_on_with_the_line_of_its_checkpoint(tmp_path: Path) -> None:
    history = three_steps(path := tmp_path / "metrics.jsonl")
    callback, state = begin(path, history[:3])
    log(callback, state, 2, eval_loss=0.3)
    assert lines(path) == [*THREE_STEPS[:2], {**THREE_STEPS[2], "eval_loss": 0.3}]


@pytest.mark.parametrize("half", [b'{"step": 4, "lo', b'{"other": 1}', b"4", b"[]", b"\xff", b""])
def test_a_damaged_line_is_named_and_dropped(
    tmp_path: Path, half: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    history = three_steps(path := tmp_path / "metrics.jsonl")
    with open(path, "ab") as file:
        file.write(half)
    assert RunDir(tmp_path).metric_lines() == THREE_STEPS
    assert ("metrics.jsonl: damaged in line 5, which is not used" in caplog.text) == bool(half)
    callback, state = begin(path, history)
    assert ("damaged in line 5; the file is written again" in caplog.text) == bool(half)
    log(callback, state, 4, loss=0.2)
    assert lines(path) == [*THREE_STEPS, {"step": 4, "loss": 0.2}]


def test_a_run_that_starts_over_keeps_nothing(tmp_path: Path) -> None:
    three_steps(path := tmp_path / "metrics.jsonl")
    begin(path)
    assert lines(path) == []


def test_a_line_that_becomes_shorter_leaves_no_rest(tmp_path: Path) -> None:
    callback, state = begin(path := tmp_path / "metrics.jsonl")
    log(callback, state, 1, loss=0.123456789)
    log(callback, state, 1, loss=0.5)
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n'


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:30]),
        lambda path: path.write_bytes(path.read_bytes() + b"\xff\n"),
        lambda path: (path.unlink(), path.symlink_to(path)),
    ],
    ids=["deleted", "emptied", "truncated", "grown", "unreadable"],
)
def test_damage_from_outside_is_gone_with_the_next_log(
    tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    callback, state = begin(path := tmp_path / "metrics.jsonl", THREE_STEPS[:3])
    damage(path)
    log(callback, state, 3, loss=1 / 3)
    log(callback, state, 3, eval_loss=0.6)
    assert lines(path) == THREE_STEPS


def test_the_end_of_a_run_restores_what_no_log_noticed(tmp_path: Path) -> None:
    three_steps(path := tmp_path / "metrics.jsonl")
    callback, state = begin(path, THREE_STEPS)
    path.write_bytes(path.read_bytes().replace(b"eval_loss", b"eval\xffloss"))
    callback.on_train_end(None, state, None)
    assert lines(path) == THREE_STEPS


@pytest.mark.parametrize("opened", [False, True])
def test_a_disk_that_is_full_for_a_moment_costs_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, opened: bool
) -> None:
    """opened: the file can be opened, and half of the line is written."""
    callback, state = begin(path := tmp_path / "metrics.jsonl")
    log(callback, state, 0, eval_loss=0.7)

    def full(path: Path, mode: str = "r") -> Any:
        if opened:
            with open(path, mode) as file:
                file.write(b'{"step')
        raise OSError(28, "No space left on device")

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "open", full, raising=False)
        patch.setattr(module, "write_atomically", full_disk)
        with caplog.at_level(logging.WARNING):
            for step in (1, 2):
                log(callback, state, step, loss=1 / step)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} cannot be written (No space left on device); the next log tries again"
    ]
    log(callback, state, 3, loss=1 / 3)
    log(callback, state, 3, eval_loss=0.6)
    assert lines(path) == THREE_STEPS
