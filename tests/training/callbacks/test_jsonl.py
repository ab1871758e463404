"""metrics.jsonl has one line per step, whatever happened between."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.training.callbacks.jsonl import JsonlCallback


def begin(
    path: Path, step: int = 0, resumed: bool | None = None
) -> tuple[JsonlCallback, SimpleNamespace]:
    resumed = step > 0 if resumed is None else resumed
    # a resumed run has its history from the checkpoint
    history = [{"step": step}] if resumed else []
    callback, state = JsonlCallback(path), SimpleNamespace(global_step=step, log_history=history)
    callback.on_train_begin(None, state, None)
    return callback, state


def log(callback: JsonlCallback, state: Any, step: int, **logs: float) -> None:
    state.global_step = step
    callback.on_log(None, state, None, logs=logs)


def lines(path: Path) -> list[dict[str, Any]]:
    assert path.read_text() == "" or path.read_text().endswith("\n")
    return [json.loads(line) for line in path.read_text().splitlines()]


def three_steps(path: Path) -> list[dict[str, Any]]:
    callback, state = begin(path)
    log(callback, state, 0, eval_loss=0.7)
    for step in (1, 2, 3):
        log(callback, state, step, loss=1 / step)
    log(callback, state, 3, eval_loss=0.6)
    return lines(path)


def test_a_step_and_its_evaluation_are_one_line(tmp_path: Path) -> None:
    assert three_steps(tmp_path / "metrics.jsonl") == [
        {"step": 0, "eval_loss": 0.7},
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 1 / 3, "eval_loss": 0.6},
    ]


def test_each_line_is_on_disk_at_once(tmp_path: Path) -> None:
    callback, state = begin(path := tmp_path / "metrics.jsonl")
    for step in range(1, 4):
        log(callback, state, step, loss=0.5)
        assert len(lines(path)) == step


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_run_drops_the_steps_that_happen_again(tmp_path: Path, step: int) -> None:
    before = three_steps(path := tmp_path / "metrics.jsonl")
    callback, state = begin(path, step)
    assert lines(path) == before[: step + 1]
    log(callback, state, step + 1, loss=9.0)
    assert lines(path) == [*before[: step + 1], {"step": step + 1, "loss": 9.0}]


def test_a_resumed_run_goes_on_with_the_line_of_its_checkpoint(tmp_path: Path) -> None:
    before = three_steps(path := tmp_path / "metrics.jsonl")
    callback, state = begin(path, 2)
    log(callback, state, 2, eval_loss=0.3)
    assert lines(path) == [*before[:2], {**before[2], "eval_loss": 0.3}]


@pytest.mark.parametrize("half", ['{"step": 4, "lo', '{"other": 1}', "4", "[]", ""])
def test_a_half_written_line_is_dropped(tmp_path: Path, half: str) -> None:
    before = three_steps(path := tmp_path / "metrics.jsonl")
    with open(path, "a") as file:
        file.write(half)
    callback, state = begin(path, 3)
    log(callback, state, 4, loss=0.2)
    assert lines(path) == [*before, {"step": 4, "loss": 0.2}]


def test_a_run_that_starts_over_keeps_nothing(tmp_path: Path) -> None:
    three_steps(path := tmp_path / "metrics.jsonl")
    begin(path, 0)
    assert lines(path) == []


def test_a_run_resumed_at_step_0_keeps_its_first_evaluation(tmp_path: Path) -> None:
    callback, state = begin(path := tmp_path / "metrics.jsonl")
    log(callback, state, 0, eval_loss=0.7)
    begin(path, 0, resumed=True)
    assert lines(path) == [{"step": 0, "eval_loss": 0.7}]


def test_a_line_that_becomes_shorter_leaves_no_rest(tmp_path: Path) -> None:
    callback, state = begin(path := tmp_path / "metrics.jsonl")
    log(callback, state, 1, loss=0.123456789)
    log(callback, state, 1, loss=0.5)
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n'
