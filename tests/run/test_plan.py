"""A plan does the batch arithmetic from settings and rows alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.run import plan
from orchestrator.run.checks import hub
from orchestrator.run.plan import planned
from orchestrator.settings.errors import UserError
from support.tiny_settings import random_rows, tiny_spec, write_jsonl


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (
            {},
            {
                "train_rows": 32,
                "eval_rows": 8,
                "steps": 4,
                "epochs": 1.0,
                "steps_per_epoch": 4,
                "grad_accum": 4,
            },
        ),
        ({"cluster": {"num_workers": 3}}, {"ranks": 3, "pairs_per_rank": 3, "grad_accum": 2}),
        (
            {"cluster": {"num_workers": [1, 3]}},
            {
                "ranks": [1, 3],
                "pairs_per_rank": [8, 3],
                "micro_batch_size": 2,
                "grad_accum": [4, 2],
            },
        ),
        (
            {"batch": {"global_batch_size": 10}, "training": {"max_steps": None, "epochs": 1.5}},
            {"steps_per_epoch": 4, "last_batch_of_epoch": 2, "steps": 6, "epochs": 1.5},
        ),
        ({"training": {"max_steps": None}}, {"steps": 4, "epochs": 1.0, "last_batch_of_epoch": 8}),
        ({"evaluation": {"every_steps": 3}}, {"evaluations": 3, "checkpoints": 1}),  # before, 3, 4
        (
            {"evaluation": {"every_steps": 2}, "checkpoint": {"every_steps": 3}},
            {"evaluations": 3, "checkpoints": 2},
        ),
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
    easy, hard = (write_jsonl(tmp_path / f"{count}.jsonl", random_rows(count)) for count in (3, 5))
    facts = planned(tiny_spec(tmp_path, data={"eval": {"easy": str(easy), "hard": str(hard)}}))
    assert facts["eval_rows"] == {"easy": 3, "hard": 5}
    with pytest.raises(UserError, match=r"data.eval.hard = .*does not exist"):
        planned(tiny_spec(tmp_path, data={"eval": {"easy": str(easy), "hard": "./nowhere.jsonl"}}))


def test_each_training_set_has_its_share_of_an_epoch(tmp_path: Path) -> None:
    few = str(write_jsonl(tmp_path / "few.jsonl", random_rows(6)))
    many = tiny_spec(tmp_path).data.train[0].path
    sets = [many, {"path": few, "weight": 2.5}]
    facts = planned(
        tiny_spec(tmp_path, data={"train": sets}, training={"max_steps": None, "epochs": 2})
    )
    assert facts["train_sets"] == [
        {"source": many, "rows": 32, "weight": 1.0, "rows_per_epoch": 32},
        {"source": few, "rows": 6, "weight": 2.5, "rows_per_epoch": 15},
    ]
    assert (
        facts["train_rows"],
        facts["rows_per_epoch"],
        facts["steps_per_epoch"],
        facts["steps"],
    ) == (38, 47, 6, 12)
    assert "train_sets" not in planned(tiny_spec(tmp_path))


@pytest.mark.parametrize("train", ["org/dataset", [{"path": "org/dataset"}, {"path": "org/other"}]])
def test_rows_on_the_hub_are_left_to_the_start_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Any
) -> None:
    spec = tiny_spec(tmp_path, data={"train": train, "eval": None})
    with pytest.raises(UserError, match=r"data\.train.* = 'org/dataset'"):
        planned(spec)  # HF_HUB_OFFLINE: the run could not read it either
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    facts = planned(spec)
    assert facts["train_rows"] is None
    assert "steps" not in facts
    assert any(
        "org/dataset: its rows are checked where the run starts" in line for line in facts["notes"]
    )


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_missing_file_is_refused(tmp_path: Path, split: str) -> None:
    with pytest.raises(UserError, match=rf"data.{split} = .*does not exist"):
        planned(tiny_spec(tmp_path, data={split: str(tmp_path / "nowhere.jsonl")}))


def test_a_line_that_is_not_json_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "broken.jsonl", random_rows(3))
    path.write_text(path.read_text() + "{oh")
    with pytest.raises(UserError, match=r"data\.train row 4"):
        planned(tiny_spec(tmp_path, data={"train": str(path)}))


@pytest.mark.parametrize(
    ("training", "steps", "epochs"),
    [
        ({"max_steps": 3, "epochs": 2}, 3, 0.75),  # an epoch has 4 steps
        ({"max_steps": 9, "epochs": 2}, 8, 2.0),
        ({"max_steps": 9, "epochs": 1.5}, 6, 1.5),
    ],
)
def test_the_first_of_max_steps_and_epochs_ends_the_run(
    tmp_path: Path, training: dict[str, Any], steps: int, epochs: float
) -> None:
    facts = planned(tiny_spec(tmp_path, training=training))
    assert (facts["steps"], facts["epochs"]) == (steps, epochs)


def test_dropped_rows_do_not_count_in_the_steps(tmp_path: Path) -> None:
    tie = {"prompt": "Say", "chosen": " one", "rejected": " one"}
    path = str(write_jsonl(tmp_path / "ties.jsonl", [*random_rows(16), *[tie] * 16]))
    facts = planned(
        tiny_spec(tmp_path, data={"train": path}, training={"max_steps": None, "epochs": 1})
    )
    assert (facts["train_rows"], facts["pairs_per_epoch"], facts["steps"]) == (32, 16, 2)


@pytest.mark.parametrize(
    ("blocks", "key"),
    [
        ({"model": {"init": None, "path": "nonexistent"}}, "model.path"),
        ({"model": {"init": None, "path": "./nonexistent"}}, "model.path"),
        ({"dpo": {"loss_type": "support.user_losses:nothere"}}, "dpo.loss_type"),
        ({"dpo": {"loss_type": "no_such_module:loss"}}, "dpo.loss_type"),
        ({"callbacks": ["json:dumps"]}, "callbacks"),
        ({"data": {"collator": "no_such_module:collator"}}, "data.collator"),
        ({"evaluation": {"compute_metrics": "json:nothere"}}, "evaluation.compute_metrics"),
        (
            {"evaluation": {"compute_metrics": "json:loads"}},
            "evaluation.compute_metrics",
        ),
        ({"evaluation": {"batch_size": 2}}, "evaluation.batch_size"),
        (
            {"scheduler": {"name": "torch.optim.lr_scheduler.StepLR", "kwargs": {"oops": 1}}},
            "scheduler.kwargs",
        ),
        (
            {
                "scheduler": {
                    "name": "torch.optim.lr_scheduler.OneCycleLR",
                    "kwargs": {"max_lr": 1, "total_steps": 2},
                }
            },
            "scheduler.kwargs.total_steps",
        ),
        ({"model": {"num_frozen_layers": 2}}, "model.num_frozen_layers"),
        ({"model": {"lora": {"target_modules": ["nothere"]}}}, "model.lora.target_modules"),
        ({"optimizer": {"name": "torch.optim.Muon"}}, "optimizer.name"),
        ({"data": {"max_length": 4, "max_prompt_length": None}}, "data.train"),
        ({"reference": {"path": "./nonexistent"}}, "reference.path"),
    ],
)
def test_plan_refuses_what_the_run_refuses(
    tmp_path: Path, blocks: dict[str, Any], key: str
) -> None:
    with pytest.raises(UserError) as caught:
        planned(tiny_spec(tmp_path, **blocks))
    assert caught.value.key == key


def test_a_plan_leaves_nothing_behind(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    planned(spec)
    assert sorted(tmp_path.rglob("*")) == before


def test_models_that_the_hub_would_have_are_not_looked_at_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    facts = planned(tiny_spec(tmp_path, model={"init": None, "path": "org/model"}))
    assert any(line.startswith("model.path = org/model: is not checked") for line in facts["notes"])
    with pytest.raises(UserError, match=r"model\.path = 'nonexistent': is not a folder"):
        planned(tiny_spec(tmp_path, model={"init": None, "path": "nonexistent"}))


def test_large_data_are_tokenised_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SMALL_ROWS", 10)
    monkeypatch.setattr(plan, "FIRST_ROWS", 4)
    actual = random_rows(32)
    actual[2]["chosen"] = 3
    spec = tiny_spec(tmp_path)
    write_jsonl(Path(spec.data.train[0].path), actual)
    with pytest.raises(UserError, match=r"data\.train row 3"):
        planned(spec)
    write_jsonl(
        Path(spec.data.train[0].path),
        [{**row, "chosen": row["rejected"]} for row in actual[:4]] + random_rows(20),
    )
    assert "the first 4 rows of each source were tokenised" in planned(spec)["notes"][-1]


@pytest.mark.parametrize(
    ("blocks", "key"),
    [
        ({"precision": "tf32"}, "precision"),
        ({"model": {"attention": "varlen"}, "precision": "bf16"}, "model.attention"),
        (
            {
                "optimizer": {"name": "deepspeed.ops.adam.FusedAdam"},
                "engine": {"kind": "deepspeed"},
            },
            "optimizer.name",
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_settings_that_need_a_gpu_are_refused_without_one(
    tmp_path: Path, blocks: dict[str, Any], key: str
) -> None:
    with pytest.raises(UserError) as caught:
        planned(tiny_spec(tmp_path, **blocks))
    assert caught.value.key == key
    facts = planned(tiny_spec(tmp_path, **blocks, cluster={"resources": {"GPU": 1}}))
    assert "this machine has no GPU" in facts["notes"][0]
    planned(tiny_spec(tmp_path, **blocks), starts_here=False)
