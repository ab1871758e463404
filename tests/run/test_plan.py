"""A plan does the batch arithmetic from settings and rows alone."""

from pathlib import Path
from typing import Any

import pytest
from support import rows, tiny_spec, write_jsonl

from orchestrator.run import reach
from orchestrator.run.plan import planned
from orchestrator.settings.spec import UserError


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ({}, {"train_rows": 32, "eval_rows": 8, "steps": 4, "epochs": 1.0, "steps_per_epoch": 4, "grad_accum": 4}),
        ({"cluster": {"num_workers": 3}}, {"ranks": 3, "pairs_per_rank": 3, "grad_accum": 2}),
        (
            {"cluster": {"num_workers": [1, 3]}},
            {"ranks": [1, 3], "pairs_per_rank": [8, 3], "micro_batch_size": 2, "grad_accum": [4, 2]},
        ),
        (
            {"batch": {"global_batch_size": 10}, "training": {"max_steps": None, "epochs": 1.5}},
            {"steps_per_epoch": 4, "last_batch_of_epoch": 2, "steps": 6, "epochs": 1.5},
        ),
        ({"training": {"max_steps": None}}, {"steps": 4, "epochs": 1.0, "last_batch_of_epoch": 8}),
        ({"evaluation": {"every_steps": 3}}, {"evaluations": 3, "checkpoints": 1}),  # before, 3, 4
        ({"evaluation": {"every_steps": 2}, "checkpoint": {"every_steps": 3}}, {"evaluations": 3, "checkpoints": 2}),
        ({}, {"evaluations": 2}),  # before and after
        ({"evaluation": {"at_start": False}}, {"evaluations": 1}),
        (
            {"evaluation": {"every_steps": 3, "every_epoch": True}, "training": {"max_steps": 9}},
            {"evaluations": 6},  # before, 3, 4, 6, 8, 9
        ),
        ({"data": {"eval": None}}, {"evaluations": 0, "eval_rows": 0}),
        (
            {"data": {"eval": None, "eval_fraction": 0.25}, "training": {"max_steps": None}},
            {"train_rows": 24, "eval_rows": 8, "evaluations": 2, "steps": 3},
        ),
        ({"scheduler": {"warmup_steps": 2}}, {"warmup_steps": 2, "micro_batch_size": 2}),
        (
            {"batch": {"micro_batch_size": None, "max_tokens_per_microbatch": 500}},
            {"max_tokens_per_microbatch": 500, "global_batch_size": 8},
        ),
    ],
)
def test_batch_arithmetic(tmp_path: Path, blocks: dict[str, Any], expected: dict[str, Any]) -> None:
    facts = planned(tiny_spec(tmp_path, **blocks))
    assert {name: facts.get(name) for name in expected} == expected
    assert ("grad_accum" in facts) is ("micro_batch_size" in facts)


def test_each_evaluation_set_is_counted(tmp_path: Path) -> None:
    easy, hard = (write_jsonl(tmp_path / f"{count}.jsonl", rows(count)) for count in (3, 5))
    facts = planned(tiny_spec(tmp_path, data={"eval": {"easy": str(easy), "hard": str(hard)}}))
    assert facts["eval_rows"] == {"easy": 3, "hard": 5}
    with pytest.raises(UserError, match=r"data.eval.hard = .*does not exist"):
        planned(tiny_spec(tmp_path, data={"eval": {"easy": str(easy), "hard": "./nowhere.jsonl"}}))


def test_each_training_set_has_its_share_of_an_epoch(tmp_path: Path) -> None:
    few = str(write_jsonl(tmp_path / "few.jsonl", rows(6)))
    many = tiny_spec(tmp_path).data.train[0].path
    sets = [many, {"path": few, "weight": 2.5}]
    facts = planned(tiny_spec(tmp_path, data={"train": sets}, training={"max_steps": None, "epochs": 2}))
    assert facts["train_sets"] == [
        {"source": many, "rows": 32, "weight": 1.0, "rows_per_epoch": 32},
        {"source": few, "rows": 6, "weight": 2.5, "rows_per_epoch": 15},
    ]
    assert (facts["train_rows"], facts["rows_per_epoch"], facts["steps_per_epoch"], facts["steps"]) == (38, 47, 6, 12)
    assert "train_sets" not in planned(tiny_spec(tmp_path))



@pytest.mark.parametrize("train", ["org/dataset", [{"path": "org/dataset"}, {"path": "org/other"}]])
def test_rows_on_the_hub_are_left_to_the_start_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Any
) -> None:
    spec = tiny_spec(tmp_path, data={"train": train, "eval": None})
    with pytest.raises(UserError, match=r"data\.train.* = 'org/dataset'"):
        planned(spec)  # HF_HUB_OFFLINE: the run could not read it either
    monkeypatch.setattr(reach, "_is_offline", lambda: False)
    facts = planned(spec)
    assert facts["train_rows"] is None
    assert "steps" not in facts
    assert any("org/dataset: its rows are looked at where the run starts" in line for line in facts["notes"])


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_missing_file_is_refused(tmp_path: Path, split: str) -> None:
    with pytest.raises(UserError, match=rf"data.{split} = .*does not exist"):
        planned(tiny_spec(tmp_path, data={split: str(tmp_path / "nowhere.jsonl")}))


def test_a_line_that_is_not_json_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "broken.jsonl", rows(3))
    path.write_text(path.read_text() + "{oh")
    with pytest.raises(UserError, match=r"data\.train row 4"):
        planned(tiny_spec(tmp_path, data={"train": str(path)}))
