"""A finished run ends with prompts answered by its start and by its export, whatever goes wrong
with that.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.run.local.debug import debug
from orchestrator.training import samples
from orchestrator.training.rundir import RunDir
from support.tiny_settings import random_rows, tiny_spec, write_jsonl


def answers_of_a_run(folder: Path, **blocks: Any) -> list[dict[str, str]]:
    spec = tiny_spec(
        folder, **{"evaluation": {"samples": 2}, "training": {"max_steps": 1}, **blocks}
    )
    result = debug(spec)
    assert json.loads(RunDir(spec.run_dir).result.read_text())["samples"] == result.samples
    return result.samples


def test_a_run_answers_its_first_evaluation_prompts_before_and_after_training(
    tmp_path: Path,
) -> None:
    held_out = random_rows(4, seed=1, conversational=True)
    write_jsonl(tmp_path / "held_out.jsonl", held_out)
    write_jsonl(tmp_path / "pairs.jsonl", random_rows(16, conversational=True))
    files = {"train": str(tmp_path / "pairs.jsonl"), "eval": str(tmp_path / "held_out.jsonl")}
    answers = answers_of_a_run(
        tmp_path,
        data=files,
        optimizer={"lr": 0.05},
        dpo={"loss_type": ["sigmoid", "sft"]},
        training={"max_steps": 10},
    )
    assert [each["prompt"] for each in answers] == [
        row["prompt"][0]["content"] for row in held_out[:2]
    ]
    assert all(each["before"] != each["after"] for each in answers)


def test_the_answers_before_are_those_of_the_start(tmp_path: Path) -> None:
    answers = answers_of_a_run(tmp_path, optimizer={"lr": 1e-30})
    assert len(answers) == 2
    assert all(each["before"] == each["after"] != "" for each in answers)


def test_prompts_that_were_held_out_of_the_training_pairs_are_answered(tmp_path: Path) -> None:
    answers = answers_of_a_run(tmp_path, data={"eval": None, "eval_fraction": 0.1})
    assert len(answers) == 2
    assert {each["prompt"] for each in answers} <= {row["prompt"] for row in random_rows(32)}


def test_answers_that_fail_are_a_warning_of_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> list[str]:
        raise RuntimeError("out of memory\n on cuda:0")

    monkeypatch.setattr(samples, "greedy_answers", fail)
    assert answers_of_a_run(tmp_path) == []
    assert (
        "evaluation.samples: no prompt was answered (RuntimeError: out of memory on cuda:0)"
        in caplog.text
    )
