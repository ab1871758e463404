"""Attempts of a run: a line each, which a kill leaves, and the share of the time that counted."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.settings.errors import TrainingError, UserError
from orchestrator.training.attempts import (
    NO_CAUSE,
    WIDTH,
    Attempt,
    Record,
    goodput,
    name_cause,
    read_attempts,
    recorded,
)


def attempt(began: float, seen: float, first: int, last: int, **others: Any) -> Attempt:
    """An attempt whose steps last a second each, and which began to train after a second."""
    values: dict[str, Any] = {"training": began + 1, "steps_s": float(last - first)}
    return Attempt(began, seen, 2, 1, first_step=first, last_step=last, **values | others)


def test_a_run_without_restarts_counts_all_its_steps() -> None:
    facts = goodput([attempt(0, 20, 0, 10, end="finished")])
    assert facts is not None
    assert (facts["goodput"], facts["effective_s"], facts["restarts"]) == (0.5, 10.0, [])
    assert goodput([]) is None


def test_steps_that_a_later_attempt_repeats_do_not_count() -> None:
    """Killed at step 8, resumed from 5; its machine died before training; then from 5 again."""
    facts = goodput(
        [
            attempt(0, 10, 0, 8),
            attempt(15, 20, 0, 0, training=None, steps_s=0.0, end="died", cause="no node"),
            attempt(30, 40, 5, 12, end="finished"),
        ]
    )
    assert facts == {
        "goodput": 0.3,
        "wall_s": 40,
        "effective_s": 12.0,
        "repeated_s": 3.0,
        "between_s": 15,
        "repeated_steps": 3,
        "restarts": [
            {"end": "died", "cause": NO_CAUSE, "after_step": 8, "from_step": None, "seconds": None},
            {"end": "died", "cause": "no node", "after_step": 0, "from_step": 5, "seconds": 11},
        ],
    }


def test_an_attempt_that_went_back_twice_repeats_the_steps_of_both() -> None:
    facts = goodput([attempt(0, 9, 0, 8), attempt(9, 13, 6, 9), attempt(13, 25, 4, 12)])
    assert facts is not None
    assert (facts["effective_s"], facts["repeated_steps"]) == (12.0, 4 + 3)


def test_a_killed_attempt_leaves_its_last_step(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    record = Record(path, Attempt(1.0, 1.0, 2, 1))
    for step in (1, 2, 3):
        record.add_step(step, 0.25)
    (left,) = read_attempts(path)  # without `close`: as after kill -9
    assert (left.last_step, left.steps_s, left.end, left.why) == (3, 0.75, None, NO_CAUSE)
    assert left.seen > 1.0
    Record(path, Attempt(2.0, 2.0, 2, 1)).close("finished", "every step was taken")
    assert [each.end for each in read_attempts(path)] == [None, "finished"]
    assert path.stat().st_size == 2 * WIDTH


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (ValueError("no"), "died"),
        (KeyboardInterrupt(), "died"),
        (UserError("a", 1, "b", "c"), "refused"),
        (TrainingError("nan"), "failed"),
    ],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
def test_an_exception_is_the_cause_of_the_end(
    tmp_path: Path, error: BaseException, end: str
) -> None:
    with pytest.raises(type(error)), recorded(tmp_path / "a", 1, 1):
        raise error
    (left,) = read_attempts(tmp_path / "a")
    assert (left.end, left.cause.split(":")[0]) == (end, type(error).__name__)


def test_the_driver_names_why_an_attempt_died(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    name_cause(path, "nobody")  # there is none yet
    Record(path, Attempt(1.0, 1.0, 2, 1)).close("finished", "every step was taken")
    name_cause(path, "too late")
    Record(path, Attempt(2.0, 2.0, 2, 1))
    name_cause(path, 'rank 1 on n2\ndied: \N{SKULL AND CROSSBONES}\x00"\\' * 200)
    ends = [(each.end, each.cause[:22]) for each in read_attempts(path)]
    assert ends == [("finished", "every step was taken"), ("died", 'rank 1 on n2 died: ?\x00"')]


@pytest.mark.parametrize("damage", [b"", b"\xff\x00", b'{"began": 1}\n', b"[1]\n{", b"{" * 9000])
def test_damaged_lines_are_passed_over(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "attempts.jsonl"
    path.write_bytes(damage)
    for number in (1.0, 2.0):
        Record(path, Attempt(number, number, 2, 1)).close("stopped", "")
    assert [each.began for each in read_attempts(path)] == [1.0, 2.0]
    text = path.read_bytes().replace(b'"began": 2.0', b'"began": "x"')
    path.write_bytes(text[:-3])
    assert [each.began for each in read_attempts(path)] == [1.0]


def test_a_run_trains_without_the_file(tmp_path: Path) -> None:
    with recorded(tmp_path, 1, 1) as record:  # a folder
        record.add_step(1, 1.0)
        record.close("finished", "")
    assert read_attempts(tmp_path) == []
    assert os.listdir(tmp_path) == []


def test_a_later_version_may_add_fields(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    Record(path, Attempt(1.0, 1.0, 2, 1)).close("stopped", "")
    line = json.loads(path.read_text()) | {"new": 1}
    path.write_text(json.dumps(line) + "\n")
    assert len(read_attempts(path)) == 1
