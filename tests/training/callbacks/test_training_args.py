"""Training arguments that callbacks see hold the settings under TRL's names."""

import ast
import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments
from transformers.integrations import integration_utils

from orchestrator.training.callbacks.training_args import training_args
from orchestrator.training.rundir import RunDir
from support.callback_handlers import callbacks
from support.tiny_parts import ALONE
from support.tiny_settings import tiny_spec


def test_arguments_are_frozen_and_named_as_transformers_names_them(tmp_path: Path) -> None:
    args = callbacks(tmp_path).args
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.learning_rate = 3.0
    ours = {"max_length", "beta", "loss_type"}  # of TRL's DPOConfig
    theirs = set(dir(TrainingArguments)) | {
        field.name for field in dataclasses.fields(TrainingArguments)
    }
    unknown = {field.name for field in dataclasses.fields(args)} - ours - theirs - {"logging_dir"}
    assert unknown == set()
    assert args.to_dict()["seed"] == 7


def test_arguments_have_all_that_transformers_trackers_read(tmp_path: Path) -> None:
    args = callbacks(tmp_path).args
    read = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(integration_utils)))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "args"
    }
    # of hyperparameters
    of_searches = {"process_index", "world_size", "local_rank", "device", "report_to"}
    assert {"output_dir", "to_json_string", "to_sanitized_dict", "load_best_model_at_end"} <= read
    assert {name for name in read - of_searches if not hasattr(args, name)} == set()
    assert json.loads(args.to_json_string()) == json.loads(json.dumps(args.to_dict()))
    assert {type(value) for value in args.to_sanitized_dict().values()} == {bool, int, float, str}


def test_training_arguments_equal_the_settings(tmp_path: Path) -> None:
    spec = tiny_spec(
        tmp_path,
        training={"max_grad_norm": None},
        evaluation={"every_steps": 3, "metric_for_best": "loss"},
        checkpoint={"every_steps": 5, "keep": 4},
        scheduler={"warmup_steps": 2},
        callbacks=["tensorboard"],
    )
    args = training_args(spec, RunDir(spec.run_dir), 40, 2.5, ALONE, "bf16")
    expected = {
        "output_dir": str(tmp_path / "runs" / "tiny"),
        "run_name": "tiny",
        "max_steps": 40,
        "num_train_epochs": 2.5,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "max_grad_norm": 0.0,
        "bf16": True,
        "fp16": False,
        "tf32": False,
        "report_to": ("tensorboard",),
        "eval_steps": 3,
        "save_steps": 5,
        "save_total_limit": 4,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "eval_strategy": "steps",
        "beta": 0.1,
    }
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("evaluation", "strategy", "steps", "on_start"),
    [
        ({"every_steps": 3}, "steps", 3, True),
        ({"every_epoch": True, "at_start": False}, "epoch", None, False),
        ({"every_epoch": True, "every_steps": 3}, "steps", 3, True),
        ({}, "steps", None, True),  # after the last step
        (None, "no", None, False),
    ],
)
def test_training_arguments_hold_the_evaluation_schedule(
    tmp_path: Path,
    evaluation: dict[str, Any] | None,
    strategy: str,
    steps: int | None,
    on_start: bool,
) -> None:
    blocks = {"data": {"eval": None}} if evaluation is None else {"evaluation": evaluation}
    spec = tiny_spec(tmp_path, **blocks)
    args = training_args(spec, RunDir(spec.run_dir), 40, 2.5, ALONE, "fp32")
    assert (args.eval_strategy, args.eval_steps, args.eval_on_start) == (strategy, steps, on_start)


@pytest.mark.parametrize(
    ("best", "checkpoint", "strategy", "loads"),
    [
        (None, {}, "steps", False),
        ("loss", {}, "best", False),
        ("loss", {"every_steps": 2, "export": "best"}, "steps", True),
    ],
)
def test_training_arguments_hold_the_save_schedule(
    tmp_path: Path, best: str | None, checkpoint: dict[str, Any], strategy: str, loads: bool
) -> None:
    spec = tiny_spec(tmp_path, evaluation={"metric_for_best": best}, checkpoint=checkpoint)
    args = training_args(spec, RunDir(spec.run_dir), 40, 2.5, ALONE, "fp32")
    assert (args.save_strategy, args.load_best_model_at_end) == (strategy, loads)
