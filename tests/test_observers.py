"""Callbacks and W&B on whole runs: the seed's callbacks as they are, requests on two ranks, and the
offline file.
"""

import json
from functools import partial
from pathlib import Path

import pytest

from orchestrator.run.local.replay import replay
from orchestrator.settings.errors import UserError
from orchestrator.training.rundir import RunDir
from support.debug_runs import finish_debug, run_debug
from support.run_files import losses, metric_lines
from support.run_hooks import dies_saving
from support.tiny_settings import write_settings
from support.wandb_files import read_run

CALLBACKS = '''
import sys

from transformers import TrainerCallback

# Define a custom callback
class CustomLoggingCallback(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None:
            print(f"Step {state.global_step}: {logs}")

class Asks(TrainerCallback):
    """Asks for what the schedule would not do, on rank 0 alone, as every callback is."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == 2
        control.should_evaluate = state.global_step == 3
        control.should_log = state.global_step == 4
        control.should_training_stop = state.global_step == 5

class Raises(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("a bug of the user's")

class Looks(TrainerCallback):
    def __init__(self, expected):
        self.expected = expected

    def on_train_begin(
        self, args, state, control, model=None, processing_class=None, optimizer=None, **kwargs
    ):
        assert model is not None and processing_class is not None
        assert args.learning_rate == optimizer.param_groups[0]["initial_lr"] == self.expected
        try:
            optimizer.param_groups[0]["lr"] = 0.0  # which would have no effect
        except TypeError:
            print("refused to write")
        assert "ray" not in sys.modules  # a debugger should not have to step around it
        print("looked", args.max_steps, args.to_dict()["beta"])

    essential = True
'''


def test_wandb_offline_file_holds_every_step_once_and_no_secret(tmp_path: Path) -> None:
    canary = "canary-0123456789abcdef0123456789abcdef01"
    settings = write_settings(
        tmp_path,
        training={"max_steps": 6, "logging_steps": 2},
        wandb={"mode": "offline", "project": "trial", "group": "tests"},
        evaluation={"every_steps": 3},
        callbacks=[
            {
                "path": "my_callbacks:Takes",
                "kwargs": {"api_key": "a-users-own-key", "note": f"uses {canary}"},
            }
        ],
    )
    (tmp_path / "my_callbacks.py").write_text(
        "from transformers import TrainerCallback\n"
        "class Takes(TrainerCallback):\n"
        "    def __init__(self, api_key, note): pass\n"
    )
    finish_debug(settings, cwd=tmp_path, env={"WANDB_API_KEY": canary})
    run_dir = tmp_path / "runs" / "tiny"
    (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    run = read_run(file)
    assert (run.project, run.group, run.name) == ("trial", "tests", "tiny")
    steps = [row["_step"] for row in run.history]
    assert steps == sorted(set(steps)) == [0, 2, 3, 4, 6]
    logged = {line["step"]: line for line in metric_lines(run_dir)}
    for row in run.history:
        line = logged[row["_step"]]
        assert row.get("train/loss") == line.get("loss")
        assert row.get("eval/loss") == line.get("eval_loss")
    assert run.config["optimizer"]["lr"] == 1e-3
    assert run.config["run"]["name"] == "tiny"
    assert run.config["callbacks"][0]["kwargs"] == {"api_key": "***", "note": "uses ***"}
    for path in run_dir.rglob("wandb/**/*"):
        if path.is_file():
            content = path.read_bytes()
            assert canary.encode() not in content, path
            assert b"a-users-own-key" not in content, path


def test_transformers_callbacks_work_unchanged(tmp_path: Path) -> None:
    (tmp_path / "my_callbacks.py").write_text(CALLBACKS)
    settings = write_settings(
        tmp_path,
        training={"max_steps": 12, "logging_steps": 1},
        # nothing improves, so the third evaluation of a step stops the run
        optimizer={"lr": 1e-12},
        evaluation={"every_steps": 2, "metric_for_best": "loss"},
        callbacks=[
            "my_callbacks:CustomLoggingCallback",
            {"path": "my_callbacks:Looks", "kwargs": {"expected": 1e-12}},
            {
                "path": "transformers:EarlyStoppingCallback",
                "kwargs": {"early_stopping_patience": 2, "early_stopping_threshold": 0.01},
            },
        ],
    )
    output = finish_debug(settings, ranks=2, cwd=tmp_path)
    assert "Step 1: {'loss': " in output
    assert "refused to write" in output
    assert "looked 12 0.1" in output
    run_dir = tmp_path / "runs" / "tiny"
    # evaluated at 0, where nothing was trained, 2 (the best), 4 and 6: twice no better
    assert max(losses(run_dir)) == 6
    assert json.loads((run_dir / "result.json").read_text())["status"] == "finished"
    assert (run_dir / "model" / "model.safetensors").is_file()


def test_requests_of_callbacks_act_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "my_callbacks.py").write_text(CALLBACKS)
    settings = write_settings(
        tmp_path,
        training={"max_steps": 12, "logging_steps": 100},
        checkpoint={"keep": 5},
        callbacks=["my_callbacks:Raises", "my_callbacks:Asks"],
    )
    ended = run_debug(settings, ranks=2, cwd=tmp_path)
    assert ended.codes == [0, 0], ended.log
    assert ended.stderr.count("RuntimeError: a bug") == 1  # reported once, then dropped
    run_dir = tmp_path / "runs" / "tiny"
    saved = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert saved == ["step_00000002", "step_00000005"]
    for path in (run_dir / "checkpoints").iterdir():  # both ranks wrote their part
        assert len(list(path.glob("rank_*.safetensors"))) == 2
    lines = {line["step"]: line for line in metric_lines(run_dir)}
    assert {step for step, line in lines.items() if "eval_loss" in line} == {0, 3, 5}
    assert {step for step, line in lines.items() if "loss" in line} == {4, 5}


@pytest.mark.parametrize("killed", [False, True])
def test_a_callback_ends_an_epoch_on_all_ranks(tmp_path: Path, killed: bool) -> None:
    """Also where the process dies between what was asked and what is done."""
    settings = write_settings(
        tmp_path,
        training={"max_steps": None, "epochs": 2, "logging_steps": 1},  # 4 steps each
        evaluation={"every_epoch": True, "at_start": False},
        checkpoint={"every_steps": 2, "keep": 9},
        callbacks=[{"path": "support.run_callbacks:EndsEpoch", "kwargs": {"step": 2}}],
    )
    if killed:
        ended = run_debug(settings, ranks=2, hook=partial(dies_saving, "committed", 0, 2))
        assert -9 in ended.codes, ended.log
    finish_debug(settings, ranks=2)
    run_dir = tmp_path / "runs" / "tiny"
    epochs = [(line["step"], line["epoch"]) for line in metric_lines(run_dir)]
    assert epochs == [(1, 0.25), (2, 0.5), (3, 1.25), (4, 1.5), (5, 1.75), (6, 2.0)]
    assert {line["step"] for line in metric_lines(run_dir) if "eval_loss" in line} == {2, 6}
    with pytest.raises(
        UserError, match="a callback ended an epoch after step 2, and there is no checkpoint since"
    ):
        replay(RunDir(run_dir), 3)
    assert replay(RunDir(run_dir), 2).loss == pytest.approx(losses(run_dir)[2])
    assert replay(RunDir(run_dir), 5).loss == pytest.approx(losses(run_dir)[5])
